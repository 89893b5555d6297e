"""The figures of the README and of docs/: small tables between two markers, from the same files as the page."""

import re
from collections.abc import Iterable, Sequence

from .cases import CaseResult, Machine
from .methods import METHODS, end_to_end, memory, operators
from .sections import Section, order, section
from .words import counted, date, megabytes, percent, percents, times, timeses

BEGIN, END = r"<!-- figures(?:: (?P<benchmarks>[\w ]+))? -->", "<!-- /figures -->"


def updated(text: str, machines: list[Machine]) -> str:
    """``text`` with the figures of ``machines`` between ``<!-- figures -->`` and ``<!-- /figures -->``.

    ``<!-- figures: NAME ... -->`` shows these benchmarks only, ``<!-- figures: methods -->`` one table with a row for
    each method.

    Raises:
        ValueError: a marker is missing, or a named benchmark has no results.
    """
    blocks = list(re.finditer(f"({BEGIN}\n).*?({END})", text, re.DOTALL))
    if (len(re.findall(BEGIN, text)), text.count(END), len(blocks)) != (1, 1, 1):
        raise ValueError(
            "expected one <!-- figures --> or <!-- figures: NAME ... --> with one <!-- /figures --> after it"
        )
    [block] = blocks
    named = block["benchmarks"]
    made = methods(machines) if named == "methods" else figures(machines, None if named is None else named.split())
    return f"{text[: block.end(1)]}{made}{text[block.start(3) :]}"


def figures(machines: list[Machine], named: Sequence[str] | None = None) -> str:
    """Markdown: for every machine a table for each benchmark.

    Profiles measure the user's own models and appear on the page only.
    """
    measured = {case.of.benchmark for machine in machines for case in machine.cases if not case.section.is_profile}
    if unknown := [name for name in named or () if name not in measured]:
        raise ValueError(f"no results of {', '.join(unknown)}; there are {', '.join(sorted(measured, key=order))}")
    lines = []
    for machine in machines:
        benchmarks = sorted(
            {case.of.benchmark for case in machine.cases} & (measured if named is None else set(named)), key=order
        )
        if benchmarks:
            lines += [
                _heading(machine),
                "",
                *(line for name in benchmarks for line in [*_table(section(name), machine.of(name)), ""]),
            ]
    return "\n".join([*lines, *_without_gpu(machines)])


def methods(machines: list[Machine]) -> str:
    """Markdown: a row for each method, with ranges over all of its cases on all machines."""
    head = [
        "method",
        "what it gives",
        "end to end",
        "memory, best alternative over ours",
        "its operators, over the best alternative",
    ]
    lines = [head, ["---"] * len(head)]
    for method in METHODS:
        ratios = operators(method, machines).ratios
        counts = f"slower in {sum(ratio < 1 for ratio in ratios)} of {counted(len(ratios), 'case')}"
        baselines = [f"over {pair.against} {timeses(pair.ratios)}" for pair in end_to_end(method, machines)]
        memories = memory(method, machines)
        cells = [
            f"`{section(method.benchmark).command}`: {'; '.join(baselines)}" if baselines else "-",
            timeses(memories) if memories else "-",
            f"{timeses(ratios)}; {counts}" if ratios else "-",
        ]
        lines.append([f"**{method.name}**", method.gives, *cells])
    names = [_heading(machine).removesuffix(":") for machine in machines]
    return "\n".join([*_rows(lines), "", f"Measured on {'; '.join(names)}.", "", *_without_gpu(machines)])


def _without_gpu(machines: list[Machine]) -> list[str]:
    return ["No GPU was measured.", ""] if all(machine.device == "cpu" for machine in machines) else []


def _rows(lines: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _heading(machine: Machine) -> str:
    environments = [results.environment for _, results in machine.files]
    dates = sorted({date(environment) for environment in environments})
    cores = dict.fromkeys(counted(environment["cores"], "core") for environment in environments)
    what = [*cores, *dict.fromkeys(environment["cpu_capability"] for environment in environments)]
    partial = ["of an interrupted run in part"] if any(results.partial for _, results in machine.files) else []
    return ", ".join([f"**{machine.name}**", *what, " to ".join(dict.fromkeys((dates[0], dates[-1]))), *partial]) + ":"


def _table(topic: Section, cases: list[CaseResult]) -> list[str]:
    dtypes = list(dict.fromkeys(case.of.dtype for case in cases))
    over = [f"over {candidate}" for candidate in ("the best alternative", topic.published) if candidate]
    head = [f"`{topic.command}`" + (f": {'; '.join(over)}; % of roofline" if topic.is_operator else ""), *dtypes]
    rows: dict[tuple, list[CaseResult]] = {}
    for case in cases:
        where = (case.of.phase, case.of.variant) if topic.is_operator else (case.of.phase, case.problem)
        rows.setdefault(where, []).append(case)
    lines = [head, ["---"] * len(head)]
    for where, row_cases in rows.items():
        by_dtype = [[case for case in row_cases if case.of.dtype == dtype] for dtype in dtypes]
        lines += [_operator(where, by_dtype, topic)] if topic.is_operator else _end_to_end(where, by_dtype)
    return _rows(lines)


def _operator(where: Iterable[str], by_dtype: list[list[CaseResult]], topic: Section) -> list[str]:
    """One line with ranges over the shapes."""
    shapes = max(map(len, by_dtype))
    return [", ".join(filter(None, [*where, counted(shapes, "shape")])), *(_ranges(cases, topic) for cases in by_dtype)]


def _ranges(cases: list[CaseResult], topic: Section) -> str:
    strongest = [case.strongest.ratio for case in cases if case.strongest]
    published = [row.ratio for case in cases for row in case.baselines if row.candidate == topic.published]
    shares = [case.ours.share_of_roofline for case in cases if case.ours and case.ours.share_of_roofline is not None]
    words = [timeses(strongest) if strongest else "-"]
    words += [timeses(published) if published else "-"] if topic.published else []
    return "; ".join([*words, percents(shares) if shares else "-"])


def _end_to_end(where: Iterable[str], by_dtype: list[list[CaseResult]]) -> list[list[str]]:
    """A line for each candidate, then % of roofline and memory; a dtype has one case at most."""
    cases = [dtype_cases[0] if dtype_cases else None for dtype_cases in by_dtype]
    measured = [case for case in cases if case]
    lines = []

    def line(what, cell):
        cells = ["-" if case is None or (word := cell(case)) is None else word for case in cases]
        if any(word != "-" for word in cells):
            lines.append([f"{'the same' if lines else ', '.join(filter(None, where))}: {what}", *cells])

    def of(candidate, word):
        return lambda case: next(
            (word(row.ratio) for row in case.timed if row.candidate == candidate and row.ratio is not None), None
        )

    for candidate in dict.fromkeys(row.candidate for case in measured for row in case.baselines):
        line(f"over {candidate}", of(candidate, times))
    for candidate in measured[0].section.other_work:
        line(f"{candidate}, share of our time", of(candidate, percent))
    line(
        "% of roofline", lambda case: case.ours and case.ours.share_of_roofline and percent(case.ours.share_of_roofline)
    )
    line("peak memory, best alternative → ours", lambda case: _memory(case, "peak_bytes"))
    line("memory kept, best alternative → ours", lambda case: _memory(case, "kept_bytes"))
    return lines


def _memory(case: CaseResult, field: str) -> str | None:
    both = [getattr(row, field) for row in (case.strongest, case.ours) if row]
    return " → ".join(map(megabytes, both)) if len(both) == 2 and None not in both else None
