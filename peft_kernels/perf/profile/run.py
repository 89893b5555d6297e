"""Measure, compare, look inside, show and write."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import typer
from rich.console import Console

from ...demo import progress_bar
from ..bench.runner import first_line
from ..interruption import Keeping
from ..measure import Interrupted, Timing, interleaved, peak_memory
from ..results import OURS, Row, compared, measured
from . import plot, show
from .case import STOCK, Agreement, Case, Subject
from .dect import DecT
from .dept import DePT
from .models import NAMES, Source, source_of
from .operators import self_times
from .pasta import PASTA
from .pid import PiD
from .sweep import points, sizes_of
from .ytuning import YTuning

METHODS: dict[str, type[Subject]] = {"pid": PiD, "dept": DePT, "pasta": PASTA, "dect": DecT, "ytuning": YTuning}


@dataclass
class Found:
    """Rows and agreement of every case, and the operators' times in the first."""

    rows: list[Row] = field(default_factory=list)
    agreements: list[tuple[Case, Agreement]] = field(default_factory=list)
    operators: dict[str, dict[str, float]] = field(default_factory=dict)


def run(
    name: str,
    method: str | None,
    given: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    device: str,
    repeats: int | None,
    train: bool,
    quick: bool,
    out: Path,
    console: Console,
) -> bool:
    """Profile ``name``; False where ways disagree in float32.

    Raises:
        typer.BadParameter: an option that does not apply, or a model that cannot be read or that the method does not take.
    """
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # between PEFT and transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with _refusing("MODEL"):
        source = source_of(name, dtype, device)
    follows, method = method is None, method or _method_for(source)
    kind = METHODS[method]
    if source.kind not in kind.kinds:
        raise typer.BadParameter(f"{method} takes {' or '.join(NAMES[one] for one in kind.kinds)}, got {source}", param_hint="--method")
    if train and not kind.trains:
        raise typer.BadParameter(f"does not apply to {method}, which trains nothing in the model", param_hint="--train")
    sizes = sizes_of(given, kind.quick if quick else kind.sizes, method)
    repeats = repeats or (2 if quick else 5)

    show.header(console, source, method, follows, sizes, train, repeats)
    with _refusing("MODEL"):
        subject = kind(source, train, {axis: max(values) for axis, values in sizes.items()})
        cases = list({case.thing: case for point in points(sizes) for case in subject.cases(point)}.values())
    show.ways(console, subject.ways)
    stem = f"profile_{method}{'_train' if train else ''}"
    traces = {way: out / f"{stem}_{way}.trace.json.gz" for way in (STOCK, OURS)}
    found = Found()
    with (
        Keeping(found.rows) as kept,
        progress_bar(console, len(cases[0].ways) + len(traces) + sum(len(case.ways) * (1 + repeats) for case in cases)) as step,
    ):
        _measure(found, cases, repeats, source, method, traces, step)

    path = measured(found.rows, device, partial=kept.partial).write(out / f"{stem}.json")
    axes = [axis for axis, values in sizes.items() if len(values) > 1 and not kept.partial]
    plots = [plot.sweep(found.rows, axis, out / f"{stem}_{axis}.png") for axis in axes]
    show.results(console, found.rows, sizes)
    agree = show.agreements(console, found.agreements, dtype)
    if len(found.operators) == len(traces):
        show.operators(console, found.operators)
    show.written(console, [path, path.with_suffix(".csv"), *plots, *(traces[way] for way in found.operators)])
    kept.end(console)
    return agree


@contextmanager
def _refusing(argument: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(first_line(error), param_hint=argument) from error


def _method_for(source: Source) -> str:
    if source.kind == "encoder-decoder":
        return "pid"
    fitting = [name for name, kind in METHODS.items() if source.kind in kind.kinds]
    raise typer.BadParameter(f"needed for {source}: one of {', '.join(fitting)}", param_hint="--method")


def _measure(
    found: Found, cases: Sequence[Case], repeats: int, source: Source, method: str, traces: Mapping[str, Path], step: Callable[[str], None]
) -> None:
    for way, make in cases[0].ways.items():
        step(f"warming up: {way}")
        make()()
    for case in cases:
        runs, outputs, peaks = {}, {}, {}
        for way, make in case.ways.items():
            step(f"{case.phase}: {way}, memory")
            runs[way] = make()
            outputs[way], peaks[way], _ = peak_memory(runs[way], source.device)
        agreement = case.check(outputs)
        try:
            timings = interleaved(runs, repeats, warmup=0, device=source.device, notify=lambda way, case=case: step(f"{case.phase}: {way}"))
        except Interrupted as stop:
            if stop.timings:
                found.rows += _rows(case, stop.timings, peaks, source, method)
                found.agreements.append((case, agreement))
            raise
        found.rows += _rows(case, timings, peaks, source, method)
        found.agreements.append((case, agreement))
        for way, trace in traces.items() if case is cases[0] else ():
            step(f"torch.profiler: {way}")
            found.operators[way] = self_times(runs[way], source.device, trace)


def _rows(case: Case, timings: Mapping[str, Timing], peaks: Mapping[str, int | None], source: Source, method: str) -> Iterator[Row]:
    what = {"benchmark": f"profile {method}", "variant": source.title, "dtype": str(source.dtype).removeprefix("torch.")}
    what |= {"shape": case.shape, "phase": case.phase, "items": case.items, "item": case.item}
    yield from compared(timings, {way: {"peak_bytes": peak} for way, peak in peaks.items()}, **what)
    for way, reason in case.missing.items():
        yield Row(**what, way=way, missing=reason)
