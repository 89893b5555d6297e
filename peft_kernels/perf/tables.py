"""Tables for the terminal: any lines of cells, and result rows."""

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from .results import Row

COLUMNS = {
    "time": lambda row: seconds(row.median_s),
    "spread": lambda row: None if row.spread is None else f"{row.spread:.0%}",
    "runs": lambda row: str(row.runs),
    "x ours": lambda row: None if row.ratio is None else f"{row.ratio:.2f}",
    "% of roofline": lambda row: None if row.share_of_roofline is None else f"{100 * row.share_of_roofline:.0f}",
    "{item}/s": lambda row: None if row.items is None else count(row.items / row.median_s),
    "peak MB": lambda row: None if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}",
    "kept MB": lambda row: None if row.kept_bytes is None else f"{row.kept_bytes / 1e6:,.1f}",
    "error": lambda row: None if row.error is None else f"{row.error:.0e}",
}

# columns dropped from a terminal that is too narrow, first to last
LEAST_WANTED = ("runs", "error", "kept MB", "spread", "{item}/s", "peak MB", "% of roofline")


class FittingTable:
    """A table with as many columns as fit into the terminal; a column without any cell is left out.

    ``lines``: heading -> cell in rich's markup; an empty line is a gap. ``text``: columns of words, which are folded;
    the others hold numbers. ``least_wanted``: columns that give way on a narrow terminal, first to last, and are then
    named below the table.
    """

    def __init__(
        self, lines: Sequence[Mapping[str, str | None]], text: Sequence[str], least_wanted: Sequence[str] = ()
    ):
        self.lines, self.text = lines, text
        headings = dict.fromkeys(heading for line in lines for heading in line)
        self.headings = [heading for heading in headings if any(line.get(heading) for line in lines)]
        self.least_wanted = [heading for heading in least_wanted if heading in self.headings]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for dropped in range(len(self.least_wanted) + 1):
            table = self._table(self.least_wanted[:dropped])
            if Measurement.get(console, options.update(max_width=10**6), table).maximum <= options.max_width:
                break
        yield table
        if dropped:
            yield f"  [dim]no room for {', '.join(self.least_wanted[:dropped])}[/dim]"

    def _table(self, dropped: Sequence[str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD)
        headings = [heading for heading in self.headings if heading not in dropped]
        for heading in headings:
            words = heading in self.text
            table.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
        for line in self.lines:
            if line:
                table.add_row(*(line.get(heading) or "-" for heading in headings))
            else:
                table.add_section()
        return table


def table(rows: Sequence[Row]) -> Group:
    """A table of rows that were timed together; below it the roofline bound, and the reasons for candidates without a
    time.
    """
    first = rows[0]
    lines = [{"candidate": escape(row.candidate), **cells(row)} for row in rows if row.missing is None]
    below = [f"  roofline bound {seconds(first.roofline_s)}"] if first.roofline_s is not None else []
    if first.bytes is not None:
        below[0] += f": {count(first.bytes / 1e6)} MB, {count(first.operations / 1e9)} GFLOP"
    heading = escape(title(first.benchmark, first.shape, first.variant, first.dtype, first.phase))
    return Group(f"[bold]{heading}[/bold]", table_of(lines, first.item), *below, *missing(rows), "")


def cells(row: Row) -> dict[str, str | None]:
    """Heading -> cell; none if the row was not timed."""
    return {} if row.missing else {name.format(item=row.item): cell(row) for name, cell in COLUMNS.items()}


def table_of(lines: Sequence[Mapping[str, str | None]], item: str) -> FittingTable:
    """A table of lines that begin with a candidate and have the ``cells`` of its row."""
    return FittingTable(lines, ("candidate",), [name.format(item=item) for name in LEAST_WANTED])


def missing(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each candidate and reason that it was not timed."""
    for candidate, reason in dict.fromkeys((row.candidate, row.missing) for row in rows if row.missing is not None):
        yield f"  [yellow]missing[/yellow] {escape(candidate)}: {escape(reason)}"


def title(benchmark: str, shape: Mapping[str, int], variant: str, dtype: str, phase: str) -> str:
    """The name of a case."""
    sizes = " ".join(f"{letter}={size}" for letter, size in shape.items())
    return ", ".join(filter(None, (benchmark, sizes, variant, dtype, phase)))


def seconds(time: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if time * scale >= 1 or unit == "us":
            return f"{time * scale:.3g} {unit}" if time * scale < 100 else f"{time * scale:.0f} {unit}"


def count(value: float) -> str:
    """Format with at least three digits: ``12,345`` and ``1.23``"""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
