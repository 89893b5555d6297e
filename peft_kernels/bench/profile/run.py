"""Measure, compare, look inside, show and write."""

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from rich.console import Console

from ..demo import progress_bar
from ..measure import interleaved, peak_memory
from ..results import OURS, Row, device_name, folder_name, measured, timed
from . import plot, show
from .case import STOCK, Agreement, Case, Run
from .dect import DecT
from .dept import DePT
from .models import NAMES, Source, source_of
from .operators import self_times
from .pasta import PASTA
from .pid import PiD
from .sweep import points, sizes_of
from .ytuning import YTuning

METHODS = {"pid": PiD, "dept": DePT, "pasta": PASTA, "dect": DecT, "ytuning": YTuning}


def run(
    name: str,
    method: str | None,
    given: Mapping[str, Sequence[str] | None],
    *,
    dtype: torch.dtype,
    device: str,
    repeats: int | None,
    train: bool,
    quick: bool,
    out: Path | None,
    console: Console,
) -> bool:
    """Profile ``name``; False where ways disagree in float32.

    Raises:
        typer.BadParameter: an option that does not apply, or a model that cannot be read or that the method does not take.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA or ROCm device here", param_hint="--device")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's concern
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        source = source_of(name, dtype, device)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="MODEL") from error
    follows = method is None
    method = method or _method_for(source)
    kind = METHODS[method]
    if source.kind not in kind.kinds:
        raise typer.BadParameter(f"{method} takes {' or '.join(NAMES[one] for one in kind.kinds)}, got {source}", param_hint="--method")
    if train and not kind.trains:
        raise typer.BadParameter(f"does not apply to {method}, which trains nothing in the model", param_hint="--train")
    sizes = sizes_of(given, kind.quick if quick else kind.sizes, method)
    repeats = repeats or (2 if quick else 5)
    show.header(console, source, method, follows, sizes, train, repeats)
    try:
        subject = kind(source, train, {axis: max(values) for axis, values in sizes.items()})
        cases = list({case.thing: case for point in points(sizes) for case in subject.cases(point)}.values())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{method}: {error}", param_hint="MODEL") from error
    show.ways(console, subject.ways)

    out = out or Path("results") / folder_name(device_name(device))
    stem = f"profile_{method}{'_train' if train else ''}"
    traces = {way: out / f"{stem}_{way}.trace.json.gz" for way in (STOCK, OURS)}
    rows, agreements, operators = [], [], {}
    first, *_ = cases
    with progress_bar(console, len(first.ways) + len(traces) + sum(len(case.ways) * (1 + repeats) for case in cases)) as step:
        for way, make in first.ways.items():
            step(f"warming up: {way}")
            make()()
        for case in cases:
            runs, found, agreement = _measured(case, repeats, source, method, step)
            rows += found
            agreements.append((case, agreement))
            if case is first:
                for way, trace in traces.items():
                    step(f"torch.profiler: {way}")
                    operators[way] = self_times(runs[way], device, trace)
            del runs  # optimizers, packed weights
    show.results(console, rows, sizes)
    agree = show.agreements(console, agreements, dtype)
    show.operators(console, operators)
    measured(rows, device).write(out / f"{stem}.json")
    plots = [plot.sweep(rows, axis, out / f"{stem}_{axis}.png") for axis, values in sizes.items() if len(values) > 1]
    show.written(console, [out / f"{stem}.json", out / f"{stem}.csv", *plots, *traces.values()])
    return agree


def _method_for(source: Source) -> str:
    if source.kind == "encoder-decoder":
        return "pid"
    fitting = [name for name, kind in METHODS.items() if source.kind in kind.kinds]
    raise typer.BadParameter(f"needed for {source}: one of {', '.join(fitting)}", param_hint="--method")


def _measured(case: Case, repeats: int, source: Source, method: str, step: Callable[[str], Any]) -> tuple[dict[str, Run], list[Row], Agreement]:
    runs, outputs, peaks = {}, {}, {}
    for way, make in case.ways.items():
        step(f"{show.point(case)}: {way}, memory")
        runs[way] = make()
        outputs[way], peaks[way], _ = peak_memory(runs[way], source.device)
    agreement = case.check(outputs)
    outputs.clear()
    timings = interleaved(runs, repeats, warmup=0, device=source.device, notify=lambda way: step(f"{show.point(case)}: {way}"))

    def row(way: str, **fields) -> Row:
        what = {"benchmark": f"profile {method}", "variant": source.title, "dtype": str(source.dtype).removeprefix("torch.")}
        return Row(**what, shape=case.shape, phase=case.phase, way=way, items=case.items, item=case.item, **fields)

    rows = []
    for way, timing in timings.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(timing.seconds, timings[OURS].seconds))
        rows.append(row(way, **timed(timing), ratio=ratio, peak_bytes=peaks[way]))
    return runs, rows + [row(way, missing=reason) for way, reason in case.missing.items()], agreement
