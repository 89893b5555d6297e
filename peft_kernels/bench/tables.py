"""Rows as a table for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from .results import Row

COLUMNS = {
    "time": lambda row: seconds(row.median_s),
    "spread": lambda row: "-" if row.spread is None else f"{row.spread:.0%}",
    "runs": lambda row: str(row.runs),
    "x ours": lambda row: f"{row.ratio:.2f}",
    "of floor": lambda row: None if row.share_of_floor is None else f"{row.share_of_floor:.0%}",
    "peak MB": lambda row: None if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}",
    "kept MB": lambda row: None if row.kept_bytes is None else f"{row.kept_bytes / 1e6:,.1f}",
    "{item}/s": lambda row: None if row.items is None else f"{row.items / row.median_s:,.0f}",
}


def table(rows: Sequence[Row]) -> Table:
    """Rows that were timed together. What was not timed stands below, with its reason."""
    shown = [row for row in rows if row.missing is None]
    cells = {name: [cell(row) for row in shown] for name, cell in COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    missing = "\n".join(escape(f"{row.way} not run: {row.missing}") for row in rows if row.missing is not None)
    result = Table("way", title=title(rows[0]), title_justify="left", caption=missing, caption_justify="left", box=box.SIMPLE_HEAD)
    for name in cells:
        result.add_column(name.format(item=rows[0].item), justify="right")
    for i, row in enumerate(shown):
        result.add_row(escape(row.way), *(column[i] or "-" for column in cells.values()))
    return result


def title(row: Row) -> str:
    shape = ", ".join(f"{letter}={size}" for letter, size in row.shape.items())
    return escape(", ".join(part for part in (row.benchmark, shape, row.variant, row.dtype, row.phase) if part))


def seconds(time: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if time * scale >= 1 or unit == "us":
            return f"{time * scale:.3g} {unit}" if time * scale < 100 else f"{time * scale:.0f} {unit}"
