"""Measure, compare, profile, show and write."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import typer
from rich.console import Console

from ..interruption import Keeping
from ..measure import Interrupted, Timing, interleaved, peak_memory
from ..progress import progress_bar
from ..results import OURS, Row, compared, first_line, measured
from . import plot, show
from .dect import DecT
from .dept import DePT
from .measurement import STOCK, Agreement, Measurement, Subject
from .models import NAMES, Source, source_of
from .operator_times import self_times
from .pasta import PASTA
from .pid import PiD
from .sweep import points, sizes_of
from .ytuning import YTuning

METHODS: dict[str, type[Subject]] = {"pid": PiD, "dept": DePT, "pasta": PASTA, "dect": DecT, "ytuning": YTuning}


@dataclass
class Findings:
    """Rows and agreement of every case, and the operators' times in the first."""

    rows: list[Row] = field(default_factory=list)
    agreements: list[tuple[Measurement, Agreement]] = field(default_factory=list)
    operators: dict[str, dict[str, float]] = field(default_factory=dict)


def run(
    name: str,
    method: str | None,
    options: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    device: str,
    repeats: int | None,
    train: bool,
    quick: bool,
    out: Path,
    console: Console,
) -> bool:
    """Profile ``name``; False if candidates disagree in float32.

    Raises:
        typer.BadParameter: an option does not apply, or the model cannot be read or is not supported by the method.
    """
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # raised between PEFT and transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with _refusing("MODEL"):
        source = source_of(name, dtype, device)
    follows, method = method is None, method or _method_for(source)
    kind = METHODS[method]
    if source.kind not in kind.kinds:
        raise typer.BadParameter(
            f"{method} takes {' or '.join(map(NAMES.get, kind.kinds))}, got {source}", param_hint="--method"
        )
    if train and not kind.trains:
        raise typer.BadParameter(f"does not apply to {method}, which trains nothing in the model", param_hint="--train")
    sizes = sizes_of(options, kind.quick if quick else kind.sizes, method)
    repeats = repeats or (2 if quick else 5)

    show.header(console, source, method, follows, sizes, train, repeats)
    with _refusing("MODEL"):
        subject = kind(source, train, {axis: max(values) for axis, values in sizes.items()})
        cases = list({case.case: case for point in points(sizes) for case in subject.cases(point)}.values())
    show.candidates(console, subject.candidates)
    stem = f"profile_{method}{'_train' if train else ''}"
    traces = {candidate: out / f"{stem}_{candidate}.trace.json.gz" for candidate in (STOCK, OURS)}
    findings = Findings()
    with (
        Keeping(findings.rows) as kept,
        progress_bar(
            console,
            len(cases[0].candidates) + len(traces) + sum(len(case.candidates) * (1 + repeats) for case in cases),
        ) as step,
    ):
        _measure(findings, cases, repeats, source, method, traces, step)

    path = measured(findings.rows, device, partial=kept.partial).write(out / f"{stem}.json")
    axes = [axis for axis, values in sizes.items() if len(values) > 1 and not kept.partial]
    plots = [plot.sweep(findings.rows, axis, out / f"{stem}_{axis}.png") for axis in axes]
    show.results(console, findings.rows, sizes)
    agree = show.agreements(console, findings.agreements, dtype)
    if len(findings.operators) == len(traces):
        show.operators(console, findings.operators)
    show.written(
        console, [path, path.with_suffix(".csv"), *plots, *(traces[candidate] for candidate in findings.operators)]
    )
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
    findings: Findings,
    cases: Sequence[Measurement],
    repeats: int,
    source: Source,
    method: str,
    traces: Mapping[str, Path],
    step: Callable[[str], None],
) -> None:
    for candidate, make in cases[0].candidates.items():
        step(f"warming up: {candidate}")
        make()()
    for case in cases:
        runs, outputs, peaks = {}, {}, {}
        for candidate, make in case.candidates.items():
            step(f"{case.phase}: {candidate}, memory")
            runs[candidate] = make()
            outputs[candidate], peaks[candidate], _ = peak_memory(runs[candidate], source.device)
        agreement = case.check(outputs)
        try:
            timings = interleaved(
                runs,
                repeats,
                warmup=0,
                device=source.device,
                notify=lambda candidate, case=case: step(f"{case.phase}: {candidate}"),
            )
        except Interrupted as stop:
            if stop.timings:
                findings.rows += _rows(case, stop.timings, peaks, source, method)
                findings.agreements.append((case, agreement))
            raise
        findings.rows += _rows(case, timings, peaks, source, method)
        findings.agreements.append((case, agreement))
        for candidate, trace in traces.items() if case is cases[0] else ():
            step(f"torch.profiler: {candidate}")
            findings.operators[candidate] = self_times(runs[candidate], source.device, trace)


def _rows(
    case: Measurement, timings: Mapping[str, Timing], peaks: Mapping[str, int | None], source: Source, method: str
) -> Iterator[Row]:
    common = {
        "benchmark": f"profile {method}",
        "variant": source.title,
        "dtype": str(source.dtype).removeprefix("torch."),
    }
    common |= {"shape": case.shape, "phase": case.phase, "items": case.items, "item": case.item}
    yield from compared(timings, {candidate: {"peak_bytes": peak} for candidate, peak in peaks.items()}, **common)
    for candidate, reason in case.missing.items():
        yield Row(**common, candidate=candidate, missing=reason)
