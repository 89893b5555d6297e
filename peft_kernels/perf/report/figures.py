"""Plots as inline SVG in the page's colours: one drawing serves the light theme, the dark one and paper."""

import io
import math
import re
from collections.abc import Sequence
from importlib.resources import files

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..measure import Peaks
from ..results import Row
from .methods import Comparison
from .words import rate, seconds, timeses

# Placeholder colours, which stand for the variables of style.css.
VARIABLES = {
    "ink": "#fe0001",
    "muted": "#fe0002",
    "line": "#fe0003",
    "panel": "#fe0004",
    **{f"series-{i}": f"#fe001{i}" for i in range(7)},
}
REWRITTEN = {
    r'<g id="[^"]*"': "<g",
    "xlink:href": "href",
    r"font: ([\d.]+px)[^;]*": r"font-size: \1",
    r"font-family: [^;]*; ": "",
    r"\s*\n\s*": "\n",
    **{colour: f"var(--{variable})" for variable, colour in VARIABLES.items()},
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {
    "svg.fonttype": "none",
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
    """Operations per second over operations per byte, a point for each row; all rows have bytes, operations and a
    time.
    """
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
        axes.text(
            high,
            peaks.rate * 1.15,
            f"matmul {rate(peaks.rate)}op/s ",
            ha="right",
            va="bottom",
            color=VARIABLES["muted"],
        )
        axes.text(
            0.03, 0.97, f"copy {rate(peaks.bandwidth)}B/s", transform=axes.transAxes, va="top", color=VARIABLES["muted"]
        )
        axes.set_xlabel("operations per byte")
        axes.set_ylabel("operations per second")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value).strip()))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.figure.legend(loc="outside upper left", ncols=2, handletextpad=0.3)

    return _svg(draw, name)


def scaling(lines: dict[str, list[tuple[int, float]]], letter: str, candidates: Sequence[str], name: str) -> Markup:
    """Seconds over one size.

    ``lines``: candidate -> points; ``candidates``: all of the section, which fixes a candidate's colour.
    """
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


def methods(comparisons: Sequence[Comparison], name: str) -> str:
    """A standalone file: a tick for each measured case at the alternative's time over ours, a line for each
    comparison.
    """
    rows = [(-i, comparison) for i, comparison in enumerate(comparisons)]
    names = list(dict.fromkeys(comparison.method.name for comparison in comparisons))
    text = [f"{comparison.subject} against {comparison.against}" for comparison in comparisons]

    def draw(axes):
        axes.figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # inches: the reader's font may be wider
        axes.set_xscale("log")
        axes.axvline(1, color=VARIABLES["ink"], linewidth=1)
        for y, comparison in rows:
            color = VARIABLES[f"series-{names.index(comparison.method.name) % 7}"]
            axes.plot([min(comparison.ratios), max(comparison.ratios)], [y, y], color=color, linewidth=1)
            xs, ys = zip(*((x, y + dy) for x in comparison.ratios for dy in (-0.32, 0.32, math.nan)))
            axes.plot(xs, ys, color=color, linewidth=2)  # one path for all ticks
        axes.set_yticks([y for y, _ in rows], text)
        axes.set_ylim(-len(rows) + 0.3, 0.7)
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.minorticks_off()
        axes.set_xlabel("times as long as ours, a tick for each case; below 1x ours is slower")

    description = "\n".join(f"{label}: {timeses(comparison.ratios)}" for label, comparison in zip(text, comparisons))
    return _standalone(_svg(draw, name, (7.6, 0.24 * len(rows) + 0.7)), description)


def _standalone(svg: str, description: str) -> str:
    """An SVG file with the colours of both themes and a background, because the page around it may have the other
    theme.
    """
    colours = (files(__package__) / "style.css").read_text(encoding="utf-8").partition("* {")[0]
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    size = f'width="{1.4 * width:.0f}" height="{1.4 * height:.0f}"'
    style = f"{colours}text {{ font-family: system-ui, -apple-system, sans-serif; }}"
    head = (
        f"<desc>{escape(description)}</desc><style>{style}</style><rect width='100%' height='100%' rx='6'"
        " fill='var(--panel)'/>"
    )
    opening, _, body = svg.partition(">")
    return f'<svg xmlns="http://www.w3.org/2000/svg"{opening.removeprefix("<svg")} {size}>{head}{body}'


def _look(i: int) -> dict:
    """Colour and marker of the i-th series; the eighth has the colour of the first and its own marker."""
    return {"color": VARIABLES[f"series-{i % 7}"], "marker": MARKERS[i % len(MARKERS)]}


def _svg(draw, name: str, size: tuple[float, float] = SIZE) -> Markup:
    """``name`` is the drawing's accessible name, and unique: it salts the ids of clip paths and markers. Ids of groups,
    which are the same in every drawing and refer to nothing, are removed, and so are fonts, which the page sets.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(size, layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = text.getvalue().partition("<svg ")[2].partition(">")[2]
    for pattern, replacement in REWRITTEN.items():
        body = re.sub(pattern, replacement, body)
    body = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", body)
    width, height = figure.get_size_inches() * 72
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(name)}">{body}')
