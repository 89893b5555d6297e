"""The page: the content of the template, and the template filled in."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files

from jinja2 import Environment, FunctionLoader
from markupsafe import Markup

from ..results import OURS
from . import bars, figures, words
from .cases import CaseResult, Machine
from .methods import METHODS, end_to_end, operators
from .sections import order, section

LEAST_INTENSITY = (
    1  # operations per byte: a benchmark below only moves memory, and bars of % of roofline show all of it
)


def page(machines: list[Machine]) -> str:
    """HTML with everything in it, including styles and drawings."""
    environment = Environment(loader=FunctionLoader(_source), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {name: getattr(words, name) for name in words.__all__}
    benchmarks = sorted({case.of.benchmark for machine in machines for case in machine.cases}, key=order)
    axis = bars.RatioAxis(case.strongest.ratio for machine in machines for case in machine.cases if case.strongest)
    content = {
        "style": Markup(_source("style.css")),
        "machines": [_facts(machine) for machine in machines],
        "has_gpu": any(machine.device != "cpu" for machine in machines),
        "overviews": _overviews(machines, benchmarks, axis),
        "axis": axis,
        "sections": [_section(machines, benchmark) for benchmark in benchmarks],
    }
    return environment.get_template("page.html").render(content)


def picture(machines: list[Machine]) -> str:
    """SVG of all methods in one drawing, end to end and by their operators."""
    pairs = [pair for method in METHODS for pair in (*end_to_end(method, machines), operators(method, machines))]
    comparisons = [pair for pair in pairs if pair.ratios]
    if not comparisons:
        raise ValueError("expected results of at least one method, found none")
    return figures.methods(
        comparisons, f"Alternatives over ours, on {' and '.join(machine.name for machine in machines)}"
    )


def _source(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _facts(machine: Machine) -> dict:
    """The machine as its files describe it; lists all values of a field that changed between files."""
    environments = [results.environment for _, results in machine.files]

    def all_of(word) -> str:
        return " and ".join(dict.fromkeys(word(environment) for environment in environments))

    facts = {
        "device": machine.device.upper(),
        "cores": all_of(lambda e: f"{words.counted(e['cores'], 'core')}, {words.counted(e['threads'], 'thread')}"),
        "instructions": all_of(lambda e: e["cpu_capability"]),
        "system": all_of(lambda e: e["system"]),
    }
    if machine.device != "cpu":
        facts["GPU"] = all_of(lambda e: "; ".join(e["gpus"]))
        facts["CPU"] = all_of(lambda e: e["cpu"])
    packages = dict.fromkeys(name for environment in environments for name in environment["versions"])
    dates = sorted(map(words.date, environments))
    return {
        "name": machine.name,
        "facts": facts,
        "versions": {name: all_of(lambda e, name=name: e["versions"].get(name, "not installed")) for name in packages},
        "dates": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "files": machine.files,
    }


def _overviews(machines, benchmarks, axis) -> dict[str, list[dict]]:
    kinds = {"Operators": [], "Methods, end to end": []}
    for topic in map(section, benchmarks):
        cells = [_cell(machine.of(topic.benchmark), axis) for machine in machines]
        kinds["Operators" if topic.is_operator else "Methods, end to end"].append({"section": topic, "cells": cells})
    return {kind: rows for kind, rows in kinds.items() if rows}


def _cell(cases: list[CaseResult], axis) -> dict | None:
    """The ratios of ours over all cases of a benchmark on a machine; None if nothing was measured."""
    if not cases:
        return None
    compared = [case for case in cases if case.strongest]
    ratios = [case.strongest.ratio for case in compared]
    shares = [case.ours.share_of_roofline for case in cases if case.ours and case.ours.share_of_roofline is not None]
    return {
        "mean": statistics.geometric_mean(ratios) if ratios else None,
        "ratios": ratios,
        "behind": sum(ratio < 1 for ratio in ratios),
        "dots": [(axis.at(case.strongest.ratio), _named(case), case.strongest.ratio < 1) for case in compared],
        "share": statistics.median(shares) if shares else None,
        "shares": shares,
    }


def _named(case: CaseResult) -> str:
    return (
        f"{case.problem}, {case.of.phase}, {case.of.dtype}: {words.times(case.strongest.ratio)} over"
        f" {case.strongest.candidate}"
    )


def _section(machines: list[Machine], benchmark: str) -> dict:
    by_machine = [(machine, machine.of(benchmark)) for machine in machines]
    blocks = [_block(machine, cases) for machine, cases in by_machine if cases]
    fixed = [
        f"{letter}={count}"
        for _, cases in by_machine
        for case in cases
        for letter, count in case.of.shape.items()
        if letter in case.fixed
    ]
    return {
        "section": section(benchmark),
        "fixed": list(dict.fromkeys(fixed)),
        "blocks": blocks,
        "common": _common(by_machine),
    }


def _common(by_machine: list[tuple[Machine, list[CaseResult]]]) -> dict | None:
    """Cases that several machines measured, side by side."""
    columns = [(machine, {case.of.case: case for case in cases}) for machine, cases in by_machine if cases]
    counts = Counter(case for _, by_case in columns for case in by_case)
    rows = [[by_case.get(case) for _, by_case in columns] for case, count in counts.items() if count > 1]
    return {"machines": [machine.name for machine, _ in columns], "rows": rows} if rows else None


def _block(machine: Machine, cases: list[CaseResult]) -> dict:
    """The content for one benchmark on one machine."""
    on_roof = [case for case in cases if _intensity(case) is not None]
    if max(map(_intensity, on_roof), default=0) < LEAST_INTENSITY:
        on_roof = []
    return {
        "machine": machine,
        "dates": " and ".join(sorted({words.date(case.results.environment) for case in cases})),
        "partial": any(case.results.partial for case in cases),
        "speed": bars.speed(cases),
        "rooflines": bars.rooflines([] if on_roof else cases),
        "roofs": _roofs(machine, on_roof),
        "scaling": _scaling(machine, cases),
        "amounts": bars.amounts(cases),
        "missing": _missing(cases),
        "cases": cases,
    }


def _intensity(case: CaseResult) -> float | None:
    """Operations per byte, if the roofline bound is known."""
    bounded = case.ours and case.ours.bytes and case.ours.operations and case.peaks
    return case.ours.operations / case.ours.bytes if bounded else None


def _roofs(machine: Machine, cases: list[CaseResult]) -> list[dict]:
    """A roofline drawing for each dtype and each file's peaks."""
    by_roof: dict[tuple, list[CaseResult]] = {}
    for case in cases:
        by_roof.setdefault((case.of.dtype, case.peaks.bandwidth, case.peaks.rate), []).append(case)
    drawings = []
    for number, ((dtype, *_), group) in enumerate(by_roof.items()):
        name = f"roofline {number} of {group[0].of.benchmark}, {dtype}, {machine.name}"
        drawings.append({"title": dtype, "svg": figures.roofline([case.ours for case in group], group[0].peaks, name)})
    return drawings


def _scaling(machine: Machine, cases: list[CaseResult]) -> list[dict]:
    """Drawings of the candidates' times over a letter, for problems that differ only in this letter."""
    candidates = [OURS, *dict.fromkeys(row.candidate for case in cases for row in case.baselines)]
    sweeps: dict[tuple, list[tuple[int, CaseResult]]] = {}
    for case in cases:
        sizes, variant = _sizes(case, cases)
        for letter, count in sizes.items():
            rest = " ".join(f"{other}={count}" for other, count in sizes.items() if other not in (letter, *case.fixed))
            sweeps.setdefault((letter, rest, variant, case.of.phase, case.of.dtype), []).append((count, case))
    drawings = []
    for (letter, *rest), sweep in sweeps.items():
        sweep = sorted(sweep, key=lambda point: point[0])
        if sweep[-1][0] >= 2 * sweep[0][0] > 0:
            title = ", ".join(filter(None, rest))
            timed = {
                candidate: [
                    (count, row.median_s) for count, case in sweep for row in case.timed if row.candidate == candidate
                ]
                for candidate in candidates
            }
            lines = {candidate: points for candidate, points in timed.items() if points}
            svg = figures.scaling(
                lines, letter, candidates, f"time over {letter} of {cases[0].of.benchmark}, {title}, {machine.name}"
            )
            drawings.append({"letter": letter, "title": title, "svg": svg})
    return drawings


def _sizes(case: CaseResult, cases: list[CaseResult]) -> tuple[dict[str, int], str]:
    """Shape and variant; a variant that counts something ("16 adapters") becomes one more size, 1 if there is no
    variant.
    """
    counts = {other.of.variant: match for other in cases if (match := re.fullmatch(r"(\d+) (\w+)", other.of.variant))}
    if not counts or case.of.variant not in ("", *counts):
        return case.of.shape, case.of.variant
    counted = {match[2]: int(match[1]) if variant == case.of.variant else 1 for variant, match in counts.items()}
    return case.of.shape | counted, ""


def _missing(cases: Iterable[CaseResult]) -> list[tuple[str, str, int]]:
    """Candidate, reason, and the number of cases."""
    counts = Counter((row.candidate, row.missing) for case in cases for row in case.missing)
    return [(*key, count) for key, count in counts.items()]
