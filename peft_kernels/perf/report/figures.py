"""Plots as inline SVG whose colours are the page's: one drawing for the light theme, the dark one and paper."""

import io
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..measure import Peaks
from ..results import Row
from .words import rate, seconds

# Drawn in colours that stand for the variables of style.css.
VARIABLES = {"ink": "#fe0001", "muted": "#fe0002", "line": "#fe0003", "panel": "#fe0004", **{f"series-{i}": f"#fe001{i}" for i in range(7)}}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "peft_kernels",
    "text.parse_math": False,
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": VARIABLES["ink"],
    "axes.edgecolor": VARIABLES["line"],
    "axes.facecolor": "none",
    "axes.labelcolor": VARIABLES["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": VARIABLES["line"],
    "grid.linewidth": 0.6,
    "xtick.color": VARIABLES["line"],
    "ytick.color": VARIABLES["line"],
    "xtick.labelcolor": VARIABLES["muted"],
    "ytick.labelcolor": VARIABLES["muted"],
    "lines.markersize": 5.5,
    "lines.markeredgewidth": 0.8,
    "lines.linewidth": 1.5,
    "figure.facecolor": "none",
    "legend.frameon": False,
}
SIZE = (4.4, 3.3)  # inches


def roofline(rows: Sequence[Row], peaks: Peaks, name: str) -> Markup:
    """Operations per second over operations per byte, a point for each row; all have bytes, operations and a time."""
    phases = list(dict.fromkeys(row.phase for row in rows))
    intensities = [row.operations / row.bytes for row in rows]
    rates = [row.operations / row.median_s for row in rows]
    ridge = peaks.rate / peaks.bandwidth
    low, high = min(*intensities, ridge) / 4, max(*intensities, ridge) * 4

    def draw(axes):
        roof = [low, ridge, high]
        axes.loglog(roof, [min(peaks.bandwidth * x, peaks.rate) for x in roof], color=VARIABLES["muted"], marker="")
        for i, phase in enumerate(phases):
            points = [(x, y) for x, y, row in zip(intensities, rates, rows) if row.phase == phase]
            axes.plot(*zip(*points), linestyle="", markeredgecolor=VARIABLES["panel"], label=phase, **_look(i))
        axes.set_xlim(low, high)
        axes.set_ylim(min(*rates, peaks.bandwidth * low) / 2, max(*rates, peaks.rate) * 2.5)
        axes.text(high, peaks.rate * 1.15, f"products {rate(peaks.rate)}op/s ", ha="right", va="bottom", color=VARIABLES["muted"])
        axes.text(0.03, 0.97, f"copy {rate(peaks.bandwidth)}B/s", transform=axes.transAxes, va="top", color=VARIABLES["muted"])
        axes.set_xlabel("operations per byte")
        axes.set_ylabel("operations per second")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value).strip()))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.figure.legend(loc="outside upper left", ncols=2, handletextpad=0.3)

    return _svg(draw, name)


def scaling(lines: dict[str, list[tuple[int, float]]], letter: str, candidates: Sequence[str], name: str) -> Markup:
    """Seconds over one size; ``lines``: candidate -> points, ``candidates``: all of the section, which fixes a candidate's colour."""
    sizes = sorted({x for points in lines.values() for x, _ in points})

    def draw(axes):
        for candidate, points in lines.items():
            i = candidates.index(candidate)
            front = {"linewidth": 2.4, "zorder": 3} if i == 0 else {}
            axes.loglog(*zip(*points), label=candidate, **_look(i), **front)
        axes.set_xlabel(letter)
        axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(sizes))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.margins(0.08)
        axes.figure.legend(loc="outside upper left", ncols=2, handlelength=1.6, columnspacing=1.2)

    return _svg(draw, name)


def _look(i: int) -> dict:
    """Of the i-th series; the eighth has the colour of the first and a marker of its own."""
    return {"color": VARIABLES[f"series-{i % 7}"], "marker": MARKERS[i % len(MARKERS)]}


def _svg(draw, name: str) -> Markup:
    """``name`` is what the drawing is called aloud, and, as no other has it, what its ids begin with."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(text.getvalue())
    for metadata in root.findall("{http://www.w3.org/2000/svg}metadata"):
        root.remove(metadata)
    prefix = re.sub(r"\W+", "-", name)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: _ours(key.rpartition("}")[2], value, prefix) for key, value in element.attrib.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": name}
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))  # its text is escaped by ElementTree


def _ours(key: str, value: str, prefix: str) -> str:
    """An attribute with ids of this drawing alone, the page's fonts and its colours."""
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href":
        return f"#{prefix}-{value[1:]}"
    value = value.replace("url(#", f"url(#{prefix}-")
    value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
    for variable, colour in VARIABLES.items():
        value = value.replace(colour, f"var(--{variable})")
    return value
