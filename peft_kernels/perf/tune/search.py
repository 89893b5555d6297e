"""``peft-kernels tune``: checks and times neighbours of the default configs beside them, and keeps the ones that are
faster.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import combinations
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ...ops import triton_runtime, tuned
from ..interruption import Keeping
from ..measure import Timing, captured, interleaved
from ..tables import FittingTable, seconds
from .targets import Target, targets

# norm of the difference over norm of the default config's result
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
LEAST_GAIN = 0.03  # share of the time; if runs scatter more than that, their spread
MOST_REGISTERS = 0.7  # for tiles; no default config exceeds it, and most configs beyond it spill
MAX_ROUNDS = 8
REPEATS = 31
WRONG = "wrong result"

Timer = Callable[[Mapping[str, Callable]], dict[str, Timing]]
Config = dict[str, int]


@dataclass(frozen=True)
class Outcome:
    """``config``: the values that differ in the faster config, None if none is faster; ``rejected``: candidate -> the
    reason that it was not timed.
    """

    target: Target
    config: Config | None
    default: Timing
    best: Timing
    tried: int
    rejected: dict[str, str]


def run(operators: Sequence[str], dtypes: Sequence[torch.dtype], out: Path | None, quick: bool, console: Console):
    """Tune on this machine's GPU.

    Raises:
        SystemExit: there is no GPU that can run Triton kernels.
    """
    if not torch.cuda.is_available():
        raise SystemExit("peft-kernels tune: torch sees no CUDA or ROCm device here")
    if reason := triton_runtime.unavailable("cuda", torch.float32):
        raise SystemExit(f"peft-kernels tune: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    tune(
        operators or list(tuned.kernels()),
        dtypes,
        device,
        out or tuned.cache_file(device),
        on_gpu,
        1 if quick else MAX_ROUNDS,
        console,
    )


def tune(
    operators: Sequence[str],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    path: Path,
    timer: Timer,
    rounds: int,
    console: Console,
):
    """Tune one operator after the other; the file is written after each, and after an interruption with the results
    until then.
    """
    for operator in operators:
        operator_targets = [target for dtype in dtypes for target in targets(operator, dtype, device)]
        if not operator_targets:
            console.print(f"{operator} has no kernels in {', '.join(map(str, dtypes))}")
            continue
        outcomes = []
        with Keeping(outcomes) as kept, Progress(console=console, transient=True) as progress:
            bar = progress.add_task(operator, total=len(operator_targets))
            for target in operator_targets:
                progress.update(bar, description=f"{operator}, {target.site.kernel}")
                outcomes.append(search(target, device, timer, rounds))
                progress.advance(bar)
        save(path, device, outcomes, console)
        console.print(f"[bold]{operator}[/bold]")
        console.print(table(operator, outcomes))
        for mistake in mistakes(outcomes):
            console.print(f"[red]{escape(mistake)}[/red]", soft_wrap=True)
        kept.end(console)
    console.print(f"{path}: peft-kernels info says what launches take.", soft_wrap=True)


def on_gpu(functions: Mapping[str, Callable]) -> dict[str, Timing]:
    return interleaved({name: captured(function) for name, function in functions.items()}, REPEATS, device="cuda")


def search(target: Target, device: torch.device, timer: Timer, rounds: int) -> Outcome:
    """Move to the fastest neighbour while one is faster than the current config, then time the result once more beside
    the default config.
    """
    launches = tuned.entries(device)
    launches.pop(target.site, None)
    kernel = tuned.kernels()[target.site.operator][target.site.kernel]
    expected, call = target.make()(), target.make()

    def launched(config, call):
        launches[target.site] = config
        return call()

    default = best = {name: target.default[name] for name in (*kernel.blocks, "num_warps", "num_stages")}
    seen, rejected = [default], {}
    for _ in range(rounds):
        candidates = []
        for config in neighbours(best, target.default, kernel):
            if config not in seen:
                seen.append(config)
                if reason := wrong(partial(launched, config, target.make()), expected, TOLERANCE[target.dtype]):
                    rejected[described(config)] = reason
                else:
                    candidates.append(config)
        if not candidates:
            break
        timings = timer({described(config): partial(launched, config, call) for config in (best, *candidates)})
        fastest = min(candidates, key=lambda config: timings[described(config)].median)
        if not is_faster(timings[described(fastest)], timings[described(best)]):
            break
        best = fastest
    timings = timer({described(config): partial(launched, config, call) for config in (default, best)})
    default_timing, best_timing = timings[described(default)], timings[described(best)]
    changed = {name: value for name, value in best.items() if value != default[name]}
    if not is_faster(best_timing, default_timing):
        changed, best_timing = None, default_timing
    launches[target.site] = changed or {}
    return Outcome(target, changed, default_timing, best_timing, len(seen) - 1, rejected)


def neighbours(config: Config, default: dict, kernel: tuned.Kernel) -> Iterator[Config]:
    """Configs one step away: one size halved or doubled, with threads unchanged or to match; half or twice the threads;
    one stage fewer or more.
    """
    allowed = {**kernel.blocks, "num_warps": tuned.WARPS, "num_stages": tuned.STAGES}
    steps = [{"num_warps": factor} for factor in (0.5, 2)]
    for block in kernel.blocks:
        steps += [step for factor in (0.5, 2) for step in ({block: factor}, {block: factor, "num_warps": factor})]
    configs = [{**config, **{name: int(config[name] * factor) for name, factor in step.items()}} for step in steps]
    if config["num_stages"] > 1:  # 1: no loop worth pipelining
        configs += [{**config, "num_stages": config["num_stages"] + step} for step in (-1, 1)]
    for near in configs:
        if all(least <= near[name] <= most for name, (least, most) in allowed.items()) and fits(near, default, kernel):
            yield near


def fits(config: Config, default: dict, kernel: tuned.Kernel) -> bool:
    """Whether all tiles leave a thread some of its registers: configs that would spill are not compiled.

    The compiler checks shared memory.
    """
    sizes = [config[name] for name in kernel.blocks] + [
        default[name] for name in {"BLOCK_D", "BD", "BQ"} - {*kernel.blocks} if name in default
    ]
    tiles = [prod(pair) for pair in combinations([*sizes, 1], 2)]
    lanes, most = (64, 512) if torch.version.hip else (32, 255)
    registers = min(most, 2048 // config["num_warps"], default.get("maxnreg", most))
    return sum(tiles) + (kernel.tiles - 1) * max(tiles) <= MOST_REGISTERS * registers * lanes * config["num_warps"]


def wrong(function: Callable[[], tuple], expected: tuple, tolerance: float) -> str | None:
    """Why a candidate is rejected: it does not run here, or its results differ. None if it is right."""
    try:
        results = function()
        errors = [difference(x, y) for x, y in zip(results, expected) if y is not None]
    except Exception as error:  # the compiler, the assembler and the driver each raise their own
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if all(error <= tolerance for error in errors):  # False for NaN
        return None
    return f"{WRONG}: differs from the default config's by {max(errors):.2g}, allowed {tolerance:.2g}"


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    if not y.is_floating_point():
        return float((x != y).sum())
    return float((x.double() - y.double()).norm() / y.double().norm())


def is_faster(timing: Timing, other: Timing) -> bool:
    return timing.median < other.median * (1 - max(LEAST_GAIN, timing.spread or 0, other.spread or 0))


def described(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def save(path: Path, device: torch.device, outcomes: Sequence[Outcome], console: Console):
    """Replace the file's entries for the measured rows; the other entries stay, unless the file was made for another
    device or version.
    """
    try:
        before = tuned.read(path, device)
    except FileNotFoundError:
        before = []
    except ValueError as error:
        console.print(f"[yellow]replaced[/yellow]: {escape(str(error))}")
        before = []
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    measured = {outcome.target.site for outcome in outcomes}
    faster = [
        tuned.Entry(outcome.target.site, outcome.config, outcome.default.median, outcome.best.median, date)
        for outcome in outcomes
        if outcome.config is not None
    ]
    tuned.write(path, device, [*(entry for entry in before if entry.site not in measured), *faster])


def table(operator: str, outcomes: Sequence[Outcome]) -> FittingTable:
    lines = []
    for outcome in outcomes:
        names = tuned.kernels()[operator][outcome.target.site.kernel].key
        sizes = ", ".join(f"{name} {value}" for name, value in zip(names, outcome.target.site.key)) or "all"
        kinds = Counter(reason.partition(":")[0] for reason in outcome.rejected.values())
        line = {
            "kernel": outcome.target.site.kernel,
            "for": sizes,
            "default": seconds(outcome.default.median),
            "best": seconds(outcome.best.median),
            "tried": str(outcome.tried),
            "rejected": ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or None,
            "faster config": None if outcome.config is None else f"[green]{described(outcome.config)}[/green]",
        }
        lines.append(line)
    return FittingTable(lines, ("kernel", "for", "rejected", "faster config"), ("tried", "rejected"))


def mistakes(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A message for each kernel whose results depend on the config: a bug here or in the compiler."""
    for outcome in outcomes:
        site = outcome.target.site
        for config, reason in outcome.rejected.items():
            if reason.startswith(WRONG):
                yield f"{site.operator}, {site.kernel} in {outcome.target.dtype}, {config}: {reason}"
