"""Rows as a table for the terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from .results import Row

COLUMNS = {
    "time": lambda row: seconds(row.median_s),
    "spread": lambda row: "-" if row.spread is None else f"{row.spread:.0%}",
    "runs": lambda row: str(row.runs),
    "x ours": lambda row: None if row.ratio is None else f"{row.ratio:.2f}",
    "% of roofline": lambda row: None if row.share_of_roofline is None else f"{100 * row.share_of_roofline:.0f}",
    "{item}/s": lambda row: None if row.items is None else f"{row.items / row.median_s:,.0f}",
    "peak MB": lambda row: None if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}",
    "kept MB": lambda row: None if row.kept_bytes is None else f"{row.kept_bytes / 1e6:,.1f}",
    "error": lambda row: None if row.error is None else f"{row.error:.0e}",
}

# columns dropped from a terminal that is too narrow, first to last
LEAST_WANTED = ("runs", "error", "kept MB", "spread", "{item}/s", "peak MB", "% of roofline")


def table(rows: Sequence[Row]) -> Group:
    """A table of rows that were timed together; below it the roofline bound, and the reasons for candidates without a
    time.
    """
    first, shown = rows[0], [row for row in rows if row.missing is None]
    cells = {name: [cell(row) for row in shown] for name, cell in COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    result = _Fitting([row.candidate for row in shown], cells, first.item)
    lines = [f"  roofline bound {seconds(first.roofline_s)}"] if first.roofline_s is not None else []
    if first.bytes is not None:
        lines[0] += f": {first.bytes / 1e6:,.1f} MB, {first.operations / 1e9:,.2f} GFLOP"
    lines += [
        f"  [yellow]missing[/yellow] {escape(row.candidate)}: {escape(row.missing)}"
        for row in rows
        if row.missing is not None
    ]
    return Group(f"[bold]{escape(title(first))}[/bold]", result, *lines, "")


class _Fitting:
    """A table of all candidates with as many columns as fit into the terminal; the others are named below it."""

    def __init__(self, candidates: Sequence[str], cells: Mapping[str, Sequence[str | None]], item: str):
        self.candidates, self.cells, self.item = candidates, cells, item

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names, left_out = list(self.cells), []
        for name in (name for name in LEAST_WANTED if name in self.cells):
            if (
                Measurement.get(console, options.update(max_width=10**6), self._table(names)).maximum
                <= options.max_width
            ):
                break
            names.remove(name)
            left_out.append(name.format(item=self.item))
        yield self._table(names)
        if left_out:
            yield f"  [dim]no room for {', '.join(left_out)}[/dim]"

    def _table(self, names: Sequence[str]) -> Table:
        result = Table(box=box.SIMPLE_HEAD)
        result.add_column("candidate", overflow="fold")
        for name in names:
            result.add_column(name.format(item=self.item), justify="right", no_wrap=True)
        for i, candidate in enumerate(self.candidates):
            result.add_row(escape(candidate), *(self.cells[name][i] or "-" for name in names))
        return result


def title(row: Row) -> str:
    """The case of a row: benchmark, shape, variant, dtype, phase."""
    shape = " ".join(f"{letter}={size}" for letter, size in row.shape.items())
    return ", ".join(filter(None, (row.benchmark, shape, row.variant, row.dtype, row.phase)))


def seconds(time: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if time * scale >= 1 or unit == "us":
            return f"{time * scale:.3g} {unit}" if time * scale < 100 else f"{time * scale:.0f} {unit}"
