"""The five methods in one view: end to end against each baseline, and their operators against the best alternative."""

from collections.abc import Iterable
from dataclasses import dataclass

from ... import ops
from .cases import CaseResult, Machine
from .sections import section


@dataclass(frozen=True)
class Method:
    name: str  # also the first word of its operators' ``about``
    gives: str
    benchmark: str  # end to end


METHODS = (
    Method(
        "PiD",
        "beam search, and many prompts of one document, on one copy of the encoder's keys and values",
        "pid_generate",
    ),
    Method(
        "DePT", "a short soft prompt and a low-rank update of the word embeddings, written in one pass", "dept_training"
    ),
    Method(
        "PASTA", "trained vectors added to [CLS] and [SEP] before every layer; the base gets no gradient", "pasta_layer"
    ),
    Method("DecT", "a classifier on one pass of a frozen language model", "dect"),
    Method("Y-Tuning", "label representations trained on cached features", "ytuning_step"),
)


@dataclass(frozen=True)
class Comparison:
    """The times of one alternative over ours, in all cases of a method, on all machines."""

    method: Method
    subject: str
    against: str
    ratios: tuple[float, ...]


def end_to_end(method: Method, machines: Iterable[Machine]) -> list[Comparison]:
    """One comparison for each baseline, in the order of the result files."""
    ratios: dict[str, list[float]] = {}
    for case in _cases([method.benchmark], machines):
        for row in case.baselines:
            ratios.setdefault(row.candidate, []).append(row.ratio)
    return [Comparison(method, method.name, candidate, tuple(values)) for candidate, values in ratios.items()]


def operators(method: Method, machines: Iterable[Machine]) -> Comparison:
    """The fastest alternative of each case of the method's operators."""
    names = [name for name in ops.__all__ if section(name).about.startswith(method.name)]
    strongest = [case.strongest for case in _cases(names, machines)]
    return Comparison(
        method, f"{method.name}'s operators", "the best alternative", tuple(row.ratio for row in strongest if row)
    )


def memory(method: Method, machines: Iterable[Machine]) -> list[float]:
    """Memory of the best alternative over ours, end to end: memory kept between steps if measured, otherwise the
    peak.
    """
    pairs = [
        (case.strongest, case.ours) for case in _cases([method.benchmark], machines) if case.strongest and case.ours
    ]
    fields = ("kept_bytes", "peak_bytes")
    sizes = [
        next(((a, b) for field in fields if (a := getattr(other, field)) and (b := getattr(ours, field))), None)
        for other, ours in pairs
    ]
    return [other / ours for other, ours in filter(None, sizes)]


def _cases(benchmarks: Iterable[str], machines: Iterable[Machine]) -> list[CaseResult]:
    return [case for machine in machines for name in benchmarks for case in machine.of(name)]
