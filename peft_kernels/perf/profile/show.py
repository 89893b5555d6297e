"""Output for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from ..results import OURS, Row, device_name
from ..tables import FittingTable, cells, missing, seconds, table_of
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
    for phase, cases in points.items():
        lines = []
        for stock, *others in cases.values():
            axes = [axis for axis, values in sizes.items() if len(values) > 1 and axis in stock.shape]
            for row in (stock, *others):
                point = {axis.replace("_", " "): str(row.shape[axis]) for axis in axes}
                ratio = None if stock.ratio is None or row.ratio is None else f"{stock.ratio / row.ratio:.2f}"
                name = f"[bold]{OURS}[/bold]" if row.candidate == OURS else escape(row.candidate)
                lines.append({**point, "candidate": name, **cells(row), "x ours": None, "x stock": ratio})
            lines += [{}] if axes else []
        console.print(_title(phase))
        console.print(table_of(lines, stock.item))
    for line in missing(rows):
        console.print(line, highlight=False)
    console.print(
        "time: median; spread: interquartile range over it; x stock: how many times faster; peak MB: above the loaded"
        " models\n",
        style="dim",
    )


def agreements(console: Console, checks: Iterable[tuple[Measurement, Agreement]], dtype: torch.dtype) -> bool:
    """Whether the candidates agree or need not: in 16 bits the summation order may decide a near-tie, which is reported
    and is no failure.
    """
    checks = list(checks)
    for case, agreement in checks:
        if not agreement.agrees:
            style = "bold red" if dtype == torch.float32 else "yellow"
            why = "DISAGREE" if dtype == torch.float32 else "differ, as 16 bits may; --dtype float32 compares exactly"
            console.print(f"[{style}]{point(case)}: stock and ours {why}: {agreement.text}[/{style}]", highlight=False)
    wrong = [agreement for _, agreement in checks if not agreement.agrees]
    if checks and not wrong:
        case, agreement = checks[0]
        more = f"; so in all {len(checks)} cases" if len(checks) > 1 else ""
        console.print(f"[green]stock and ours agree: {agreement.text}{more}[/green]", highlight=False)
    return not wrong or dtype != torch.float32


def operators(console: Console, times: Mapping[str, Mapping[str, float]]) -> None:
    """Print self times side by side, with this package's operators marked."""
    totals = {candidate: sum(self_times.values()) for candidate, self_times in times.items()}

    def largest_share(name: str) -> float:
        return max(self_times.get(name, 0.0) / totals[candidate] for candidate, self_times in times.items())

    names = sorted({name for self_times in times.values() for name in self_times}, key=largest_share, reverse=True)
    mine = [name for name in names if name.startswith(NAMESPACE)]
    shown = [name for name in names if name in mine or name in names[: LONGEST_TABLE - len(mine)]]
    others = [name for name in names if name not in shown]
    lines = []
    for label, group in [*((name, [name]) for name in shown), (f"{len(others)} others", others), ("all", names)]:
        operator = escape(label.removeprefix(NAMESPACE).removeprefix("aten::"))
        line = {"operator": f"[bold cyan]{operator}[/bold cyan]" if label in mine else operator}
        for candidate, self_times in times.items():
            time = sum(self_times.get(name, 0.0) for name in group)
            if time:
                line |= {candidate: seconds(time), f"{candidate} %": f"{100 * time / totals[candidate]:.1f}"}
        lines.append(line)
    console.print("[bold]self time by operator[/bold], one run under torch.profiler")
    console.print(FittingTable(lines, ("operator",), [f"{candidate} %" for candidate in times]))
    if mine:
        console.print("in colour: the operators of this package\n", style="dim")


def written(console: Console, paths: Iterable[Path]) -> None:
    console.print("written: " + "\n         ".join(str(path) for path in paths), highlight=False)


def _title(phase: str) -> str:
    return {"first token": "[bold]time to first token[/bold], the encoder included"}.get(phase, f"[bold]{phase}[/bold]")
