"""Bars that the page draws itself, as boxes with widths in per cent: they stay readable on a narrow screen."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..results import OURS, Row
from ..tables import count
from .cases import CaseResult, is_ours
from .words import megabytes, percent, times

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
NARROWEST, WIDEST = (0.5, 2), (TICKS[0], TICKS[-1])


@dataclass(frozen=True)
class Bar:
    label: str
    left: float  # per cent of the track, as width
    width: float
    tone: str  # a class of style.css
    text: str


@dataclass(frozen=True)
class Group:
    """The bars of one problem."""

    label: str
    bars: tuple[Bar, ...]
    share: float | None = None  # % of roofline that ours reaches, as a fraction


@dataclass(frozen=True)
class Panel:
    """Bars on one axis."""

    title: str
    groups: tuple[Group, ...]
    ticks: tuple[tuple[float, str], ...] = ()  # position in per cent, label

    @property
    def longest(self) -> tuple[int, int]:
        """The longest label and the longest text, in characters, for the widths of their columns."""
        bars = [bar for group in self.groups for bar in group.bars]
        return max((len(bar.label) for bar in bars), default=0), max((len(bar.text) for bar in bars), default=0)


class RatioAxis:
    """Logarithmic axis: half and twice are equally far from 1. Ratios outside the widest range end at its edge."""

    def __init__(self, ratios: Iterable[float]):
        ratios = list(ratios)
        low = max(min([*ratios, NARROWEST[0]]), WIDEST[0])
        high = min(max([*ratios, NARROWEST[1]]), WIDEST[1])
        self.low, self.high = (max(t for t in TICKS if t <= low), min(t for t in TICKS if t >= high))

    def at(self, ratio: float) -> float:
        clipped = min(max(ratio, self.low), self.high)
        return round(100 * math.log(clipped / self.low) / math.log(self.high / self.low), 2)

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        inside = [t for t in TICKS if self.low <= t <= self.high]
        shown = inside if len(inside) <= 6 else [t for t in inside if math.log10(t).is_integer()]
        return tuple((self.at(t), f"{t:g}x") for t in shown)


def speed(cases: list[CaseResult]) -> list[Panel]:
    """Every candidate's time over ours, a panel for each phase and dtype, all on one axis."""
    axis = RatioAxis(
        row.ratio
        for case in cases
        for row in case.timed
        if row.ratio is not None and row.candidate not in case.section.other_work
    )

    def group(case):
        compared = [row for row in case.timed if row.candidate != OURS and row.ratio is not None]
        return Group(
            case.problem, tuple(_ratio(row, case, axis) for row in compared), case.ours and case.ours.share_of_roofline
        )

    return _panels(cases, group, axis.ticks)


def _ratio(row: Row, case: CaseResult, axis: RatioAxis) -> Bar:
    """A bar from 1 to the ratio."""
    start, end = axis.at(1), axis.at(row.ratio)
    return Bar(row.candidate, min(start, end), round(abs(end - start), 2), _tone(row, case), times(row.ratio))


def _tone(row: Row, case: CaseResult) -> str:
    if is_ours(row.candidate):
        return "own"
    if row.candidate in case.section.other_work:
        return "aside"
    return ("faster" if row.ratio >= 1 else "slower") + (" strongest" if row is case.strongest else "")


def rooflines(cases: list[CaseResult]) -> list[Panel]:
    """The share of the roofline bound that ours reaches."""
    bounded = [case for case in cases if case.ours and case.ours.share_of_roofline is not None]
    full = max([1.0, *(case.ours.share_of_roofline for case in bounded)])

    def group(case):
        share = case.ours.share_of_roofline
        return Group("", (Bar(case.problem, 0, round(100 * share / full, 2), "roofline", percent(share)),))

    return _panels(bounded, group, ((0, "0"), (round(100 / full, 2), "100%")))


def amounts(cases: list[CaseResult]) -> dict[str, list[Panel]]:
    """Quantities other than time, on axes from zero: throughput and memory, if measured."""
    kinds = {
        "Throughput": (
            lambda row: row.items and row.median_s and row.items / row.median_s,
            lambda value, row: f"{count(value)} {row.item}/s",
        ),
        "Peak memory, above what stood before": (lambda row: row.peak_bytes, lambda value, row: megabytes(value)),
        "Memory kept from step to step": (lambda row: row.kept_bytes, lambda value, row: megabytes(value)),
    }
    by_kind = {name: _panels(cases, lambda case, kind=kind: _amounts(case, *kind)) for name, kind in kinds.items()}
    return {name: panels for name, panels in by_kind.items() if panels}


def _amounts(case: CaseResult, value: Callable, word: Callable) -> Group:
    amounts = [(row, number) for row in case.timed if (number := value(row)) is not None]
    full = max((number for _, number in amounts), default=0) or 1

    def bar(row, number):
        tone = "ours" if row.candidate == OURS else "own" if is_ours(row.candidate) else "other"
        return Bar(row.candidate, 0, round(100 * number / full, 2), tone, word(number, row))

    return Group(case.problem, tuple(bar(row, number) for row, number in amounts))


def _panels(cases: list[CaseResult], group: Callable[[CaseResult], Group], ticks=()) -> list[Panel]:
    """A panel for each phase and dtype that has bars."""
    by_title: dict[str, list[Group]] = {}
    for case in cases:
        if (case_group := group(case)).bars:
            by_title.setdefault(f"{case.of.phase}, {case.of.dtype}", []).append(case_group)
    return [Panel(title, tuple(groups), ticks) for title, groups in by_title.items()]
