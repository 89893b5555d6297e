"""Output for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..results import OURS, Row, device_name
from ..tables import seconds
from .measurement import Agreement, Measurement
from .models import NAMES, Source
from .operator_times import NAMESPACE

LONGEST_TABLE = 12


def header(
    console: Console,
    source: Source,
    method: str,
    follows: bool,
    sizes: Mapping[str, tuple[int, ...]],
    train: bool,
    repeats: int,
) -> None:
    console.print(
        f"[bold]{escape(source.name)}, stock and with {method}: {'a training step' if train else 'inference'}[/bold]"
    )
    if follows:
        console.print(f"method: {method}, which {NAMES[source.kind]} takes where --method names none")
    if source.random:
        console.print(
            "[yellow]model: this architecture with RANDOM weights: times and memory are real, what it says is"
            " not.[/yellow]"
        )
    shape = ", ".join(f"{axis.replace('_', ' ')} {', '.join(map(str, values))}" for axis, values in sizes.items())
    console.print(
        f"workload: {shape}; {str(source.dtype).removeprefix('torch.')}; {repeats} timed runs of each candidate, turn"
        " by turn"
    )
    threads = "" if source.device == "cuda" else f", {torch.get_num_threads()} threads"
    console.print(f"on: {device_name(source.device)}{threads}")


def candidates(console: Console, described: Mapping[str, str]) -> None:
    for candidate, text in described.items():
        console.print(f"[bold]{candidate}[/bold]: {text}", highlight=False)
    console.print()


def point(case: Measurement) -> str:
    return f"{case.phase} at {', '.join(f'{axis} {value}' for axis, value in case.shape.items())}".replace("_", " ")


def results(console: Console, rows: Sequence[Row], sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Print a table for each phase, with a line for each candidate at each point."""
    points = {}
    for row in rows:
        points.setdefault(row.phase, {}).setdefault(row.case, []).append(row)
    for phase, of_phase in points.items():
        first, *_ = next(iter(of_phase.values()))
        axes = [axis for axis, values in sizes.items() if len(values) > 1 and axis in first.shape]
        table = Table(title=_title(phase), title_justify="left", box=box.SIMPLE_HEAD)
        for axis in axes:
            table.add_column(axis.replace("_", " "), justify="right")
        table.add_column("candidate")
        for column in ("time", "spread", f"{first.item}/s", "x stock", "peak MB"):
            table.add_column(column, justify="right")
        for candidates in of_phase.values():
            stock, *_ = candidates
            for row in candidates:
                cells = [
                    *(str(row.shape[axis]) for axis in axes),
                    row.candidate,
                    *(["-"] * 5 if row.missing else _cells(row, stock)),
                ]
                table.add_row(*cells, style="bold" if row.candidate == OURS else None)
            if axes:
                table.add_section()
        console.print(table)
    for candidate, why in {row.candidate: row.missing for row in rows if row.missing}.items():
        console.print(f"{candidate}: {escape(why)}", highlight=False)
    console.print(
        "time: median; spread: interquartile range over it; x stock: how many times faster; peak MB: above the loaded"
        " models\n",
        style="dim",
    )


def _cells(row: Row, stock: Row) -> list[str]:
    return [
        seconds(row.median_s),
        "-" if row.spread is None else f"{row.spread:.0%}",
        f"{row.items / row.median_s:,.1f}",
        "-" if stock.ratio is None or row.ratio is None else f"{stock.ratio / row.ratio:.2f}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
    ]


def agreements(console: Console, found: Iterable[tuple[Measurement, Agreement]], dtype: torch.dtype) -> bool:
    """Whether the candidates agree or need not: in 16 bits the summation order may decide a near-tie, which is reported
    and is no failure.
    """
    found = list(found)
    for case, agreement in found:
        if not agreement.agrees:
            style = "bold red" if dtype == torch.float32 else "yellow"
            why = "DISAGREE" if dtype == torch.float32 else "differ, as 16 bits may; --dtype float32 compares exactly"
            console.print(f"[{style}]{point(case)}: stock and ours {why}: {agreement.text}[/{style}]", highlight=False)
    wrong = [agreement for _, agreement in found if not agreement.agrees]
    if found and not wrong:
        case, agreement = found[0]
        more = f"; so in all {len(found)} cases" if len(found) > 1 else ""
        console.print(f"[green]stock and ours agree: {agreement.text}{more}[/green]", highlight=False)
    return not wrong or dtype != torch.float32


def operators(console: Console, times: Mapping[str, Mapping[str, float]]) -> None:
    """Print self times side by side, with this package's operators marked."""
    totals = {candidate: sum(of_candidate.values()) for candidate, of_candidate in times.items()}
    names = {name for of_candidate in times.values() for name in of_candidate}
    largest = sorted(
        names,
        key=lambda name: (
            -max(of_candidate.get(name, 0.0) / totals[candidate] for candidate, of_candidate in times.items())
        ),
    )
    mine = [name for name in largest if name.startswith(NAMESPACE)]
    shown = [name for name in largest if name in mine or name in largest[: LONGEST_TABLE - len(mine)]]
    table = Table(
        "operator",
        title="[bold]self time by operator[/bold], one run under torch.profiler",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for candidate in times:
        table.add_column(candidate, justify="right")
        table.add_column("share", justify="right")
    rest = [name for name in names if name not in shown]
    lines = [(name, [name]) for name in shown] + [(f"{len(rest)} others", rest)] + [("all", list(names))]
    for label, group in lines:
        cells = []
        for candidate, of_candidate in times.items():
            time = sum(of_candidate.get(name, 0.0) for name in group)
            cells += [seconds(time), f"{time / totals[candidate]:.1%}"] if time else ["-", "-"]
        table.add_row(
            label.removeprefix(NAMESPACE).removeprefix("aten::"), *cells, style="bold cyan" if label in mine else None
        )
    console.print(table)
    if mine:
        console.print("in colour: the operators of this package\n", style="dim")


def written(console: Console, paths: Iterable[Path]) -> None:
    console.print("written: " + "\n         ".join(str(path) for path in paths), highlight=False)


def _title(phase: str) -> str:
    return {"first token": "[bold]time to first token[/bold], the encoder included"}.get(phase, f"[bold]{phase}[/bold]")
