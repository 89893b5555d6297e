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
from rich.table import Table

from ...ops import triton_runtime, tuned
from ..interruption import Keeping
from ..measure import Timing, captured, interleaved
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
Options = dict[str, int]


@dataclass(frozen=True)
class Outcome:
    """``options`` are the values that differ in the faster config, None if none is faster; ``rejected`` says why a
    candidate was not timed.
    """

    target: Target
    options: Options | None
    shipped: Timing
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
        given = [target for dtype in dtypes for target in targets(operator, dtype, device)]
        if not given:
            console.print(f"{operator} has no kernels in {', '.join(map(str, dtypes))}")
            continue
        outcomes = []
        with Keeping(outcomes) as kept, Progress(console=console, transient=True) as progress:
            bar = progress.add_task(operator, total=len(given))
            for target in given:
                progress.update(bar, description=f"{operator}, {target.site.kernel}")
                outcomes.append(search(target, device, timer, rounds))
                progress.advance(bar)
        save(path, device, outcomes, console)
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

    def launched(options, call):
        launches[target.site] = options
        return call()

    shipped = best = {name: target.shipped[name] for name in (*kernel.blocks, "num_warps", "num_stages")}
    seen, rejected = [shipped], {}
    for _ in range(rounds):
        candidates = []
        for options in neighbours(best, target.shipped, kernel):
            if options not in seen:
                seen.append(options)
                if reason := wrong(partial(launched, options, target.make()), expected, TOLERANCE[target.dtype]):
                    rejected[described(options)] = reason
                else:
                    candidates.append(options)
        if not candidates:
            break
        timings = timer({described(options): partial(launched, options, call) for options in (best, *candidates)})
        fastest = min(candidates, key=lambda options: timings[described(options)].median)
        if not is_faster(timings[described(fastest)], timings[described(best)]):
            break
        best = fastest
    timings = timer({described(options): partial(launched, options, call) for options in (shipped, best)})
    of_shipped, of_best = timings[described(shipped)], timings[described(best)]
    won = is_faster(of_best, of_shipped)
    changed = {name: value for name, value in best.items() if value != shipped[name]}
    launches[target.site] = changed if won else {}
    return Outcome(
        target, changed if won else None, of_shipped, of_best if won else of_shipped, len(seen) - 1, rejected
    )


def neighbours(options: Options, shipped: dict, kernel: tuned.Kernel) -> Iterator[Options]:
    """Configs one step away: one size halved or doubled, with threads unchanged or to match; half or twice the threads;
    one stage fewer or more.
    """
    allowed = {**kernel.blocks, "num_warps": tuned.WARPS, "num_stages": tuned.STAGES}
    steps = [{"num_warps": factor} for factor in (0.5, 2)]
    for block in kernel.blocks:
        steps += [step for factor in (0.5, 2) for step in ({block: factor}, {block: factor, "num_warps": factor})]
    found = [{**options, **{name: int(options[name] * factor) for name, factor in step.items()}} for step in steps]
    if options["num_stages"] > 1:  # 1: no loop worth pipelining
        found += [{**options, "num_stages": options["num_stages"] + step} for step in (-1, 1)]
    for one in found:
        if all(least <= one[name] <= most for name, (least, most) in allowed.items()) and fits(one, shipped, kernel):
            yield one


def fits(options: Options, shipped: dict, kernel: tuned.Kernel) -> bool:
    """Whether all tiles leave a thread some of its registers: configs that would spill are not compiled.

    The compiler checks shared memory.
    """
    sizes = [options[name] for name in kernel.blocks] + [
        shipped[name] for name in {"BLOCK_D", "BD", "BQ"} - {*kernel.blocks} if name in shipped
    ]
    tiles = [prod(pair) for pair in combinations([*sizes, 1], 2)]
    lanes, most = (64, 512) if torch.version.hip else (32, 255)
    registers = min(most, 2048 // options["num_warps"], shipped.get("maxnreg", most))
    return sum(tiles) + (kernel.tiles - 1) * max(tiles) <= MOST_REGISTERS * registers * lanes * options["num_warps"]


def wrong(function: Callable[[], tuple], expected: tuple, tolerance: float) -> str | None:
    """Why a candidate is rejected: it does not run here, or its results differ. None if it is right."""
    try:
        results = function()
        errors = [difference(x, y) for x, y in zip(results, expected) if y is not None]
    except Exception as error:  # the compiler, the assembler and the driver each raise their own
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if all(error <= tolerance for error in errors):  # False for NaN
        return None
    return f"{WRONG}: differs from the shipped result by {max(errors):.2g}, allowed {tolerance:.2g}"


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    if not y.is_floating_point():
        return float((x != y).sum())
    return float((x.double() - y.double()).norm() / y.double().norm())


def is_faster(one: Timing, other: Timing) -> bool:
    return one.median < other.median * (1 - max(LEAST_GAIN, one.spread or 0, other.spread or 0))


def described(options: Options) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


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
    found = [
        tuned.Entry(one.target.site, one.options, one.shipped.median, one.best.median, date)
        for one in outcomes
        if one.options is not None
    ]
    tuned.write(path, device, [*(entry for entry in before if entry.site not in measured), *found])


def table(operator: str, outcomes: Sequence[Outcome]) -> Table:
    found = Table("kernel", "for", title=operator, title_justify="left")
    for heading in ("shipped, ms", "best, ms", "tried"):
        found.add_column(heading, justify="right")
    found.add_column("of them rejected")
    found.add_column("instead of the shipped options")
    for one in outcomes:
        names = tuned.kernels()[operator][one.target.site.kernel].key
        sizes = ", ".join(f"{name} {value}" for name, value in zip(names, one.target.site.key)) or "all"
        times = (f"{1e3 * timing.median:.4f}" for timing in (one.shipped, one.best))
        kinds = Counter(reason.partition(":")[0] for reason in one.rejected.values())
        rejected = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
        won = "[dim]none is faster[/dim]" if one.options is None else f"[green]{described(one.options)}[/green]"
        found.add_row(one.target.site.kernel, sizes, *times, str(one.tried), rejected, won)
    return found


def mistakes(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A message for each kernel whose results depend on the config: a bug here or in the compiler."""
    for one in outcomes:
        for options, reason in one.rejected.items():
            if reason.startswith(WRONG):
                yield f"{one.target.site.operator}, {one.target.site.kernel} in {one.target.dtype}, {options}: {reason}"
