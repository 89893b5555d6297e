"""A sweep as a plot."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..results import OURS, Row
from .measurement import STOCK

COLOURS = {STOCK: "#5b7c99", OURS: "#d1603d"}
OTHER_COLOURS = ("#9aa5b1", "#7a9e7e")


def sweep(rows: Sequence[Row], axis: str, path: Path) -> Path:
    """Plot throughput, time to first token if measured, and peak memory over ``axis``, a line for each candidate."""
    along = _along([row for row in rows if axis in row.shape and not row.missing], axis)
    main = next(iter(along))
    panels = [(main, f"{along[main][0].item} per second", f"{main}: throughput", lambda row: row.items / row.median_s)]
    if "first token" in along:
        panels.append(("first token", "seconds", "time to first token", lambda row: row.median_s))
    if along[main][0].peak_bytes is not None:
        panels.append((main, "MB", f"{main}: peak memory above the model", lambda row: row.peak_bytes / 1e6))
    figure = Figure((4.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    candidates = list(dict.fromkeys(row.candidate for row in along[main]))
    colours = COLOURS | dict(zip((candidate for candidate in candidates if candidate not in COLOURS), OTHER_COLOURS))
    for panel, (phase, unit, title, value) in zip(axes[0], panels):
        for candidate in candidates:
            points = sorted((row.shape[axis], value(row)) for row in along[phase] if row.candidate == candidate)
            panel.plot(*zip(*points), marker="o", color=colours[candidate], label=candidate)
        ticks = sorted({row.shape[axis] for row in along[phase]})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_xlabel(axis.replace("_", " "))
        panel.set_ylabel(unit)
        panel.set_title(title, fontsize=10)
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    row = along[main][0]
    fixed = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in row.shape.items() if name != axis)
    figure.suptitle(f"{row.variant}, {row.benchmark.removeprefix('profile ')}, {row.dtype}; {fixed}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _along(rows: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    """Phase -> the rows that differ only in ``axis`` from the first one, where all sweeps start."""
    along: dict[str, list[Row]] = {}
    for row in rows:
        points = along.setdefault(row.phase, [])
        if not points or row.shape | {axis: 0} == points[0].shape | {axis: 0}:
            points.append(row)
    return along
