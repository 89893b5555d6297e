"""An operator against its baselines: every candidate is first checked against float64, then all are timed turn by
turn.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.problem import Candidate, Operator, Problem
from ..measure import Peaks, Timing, captured, interleaved
from ..results import OURS, Row, compared, first_line
from ..tables import title
from .revision import Missing, Revision

# Norm of the error over norm of the truth, for the output and every gradient. Integers must be equal.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
WARMUP = 3
MAX_REPEATS = 1001


@dataclass(frozen=True)
class Case:
    """An operator on one shape, variant and dtype, in one phase."""

    operator: Operator
    shape: dict[str, int]
    variant: str
    dtype: str
    backward: bool

    @property
    def phase(self) -> str:
        return "forward + backward" if self.backward else "forward"

    def problem(self, device: str) -> Problem:
        return self.operator.problem(self.shape, self.variant, getattr(torch, self.dtype), device, self.backward)

    @property
    def named(self) -> dict:
        """The fields that all rows of the case share."""
        return {
            "benchmark": self.operator.name,
            "shape": self.shape,
            "variant": self.variant,
            "dtype": self.dtype,
            "phase": self.phase,
        }

    def __str__(self):
        return title(**self.named)


def cases_of(operator: Operator, shapes: list[dict[str, int]], dtypes: list[str], phases: list[bool]) -> list[Case]:
    """Cases for all combinations.

    ``phases``: whether backward; an operator without a backward pass has no such case.
    """
    phases = [backward for backward in phases if operator.has_backward or not backward]
    return [
        Case(operator, s, v, d, b)
        for d in dtypes
        for b in phases
        for s in shapes
        for v in operator.variants
        if d in operator.dtypes
    ]


def compare(
    case: Case,
    device: str,
    limits: Peaks,
    *,
    repeats: int,
    seconds: float,
    revision: Revision | None = None,
    notify: Callable[[str, float], None] = lambda candidate, share: None,
) -> list[Row]:
    """A row for each candidate, ours first. A candidate that is wrong or cannot run has a row that says why; so has
    ours if making the problem fails.

    ``repeats`` timed runs of each candidate, more if ``seconds`` allow. ``revision`` is timed as one more candidate.
    ``notify`` gets the next step and the share of this case that is done.
    """
    torch.compiler.reset()  # earlier shapes count towards the recompilation limit
    notify("preparing", 0)
    try:
        problem = case.problem(device)
        expected = truth(problem, case.backward)
    except (
        Exception
    ) as error:  # a shape that is invalid or too large for memory must not cost the other cases their rows
        return [Row(candidate=OURS, missing=first_line(error), **case.named)]
    functions, errors, reasons = {}, {}, {}
    prepare = candidates(case, problem, device)
    for name, candidate in prepare.items():
        notify(f"checking {name}", 0)
        try:
            functions[name], errors[name] = checked(candidate(), problem, expected, case, device)
        except (
            Exception
        ) as error:  # a baseline's error becomes the reason in its row; an error of ours fails the command
            reasons[name] = first_line(error)
    del expected
    if revision is not None:
        notify(f"checking {revision.candidate}", 0)
        try:
            functions[revision.candidate] = revision.prepare(case)
            errors[revision.candidate] = functions[revision.candidate].error
        except Missing as error:
            reasons[revision.candidate] = str(error)
    cost = problem.cost(*_leaves(problem.leaves, case.backward), backward=case.backward)
    timings, roofline = _timed(functions, problem.roofline, repeats, seconds, device, notify)
    roofline = limits.roofline(cost.bytes, cost.operations) if roofline is None else roofline
    common = {**case.named, "bytes": cost.bytes, "operations": cost.operations, "roofline_s": roofline}
    rows = {
        row.candidate: row
        for row in compared(timings, {candidate: {"error": error} for candidate, error in errors.items()}, **common)
    }
    rows |= {candidate: Row(candidate=candidate, missing=reason, **common) for candidate, reason in reasons.items()}
    return [rows[candidate] for candidate in [*prepare, *([revision.candidate] if revision else [])]]


def candidates(case: Case, problem: Problem, device: str) -> dict[str, Callable[[], Candidate]]:
    """Ours; every implementation of ours that can run, if there is a choice; the baselines.

    The reference and an interpreted Triton are no candidates.
    """
    implementations = sys.modules[getattr(ops, case.operator.name).__module__].implementations
    dtype = getattr(torch, rate_dtype(case.dtype))
    names = [name for name in implementations.names if name != "reference" and (name, device) != ("triton", "cpu")]
    names = [name for name in names if implementations.unavailable(name, device, dtype) is None]
    by_name = {f"{OURS}, {name}": partial(problem.ours, name) for name in names} if len(names) > 1 else {}
    return {OURS: partial(problem.ours, "auto"), **by_name, **problem.baselines}


def rate_dtype(dtype: str) -> str:
    """The dtype whose matrix rate bounds the operator; integer operators are bound by bytes alone."""
    return dtype if getattr(torch, dtype).is_floating_point else "float32"


def truth(problem: Problem, backward: bool) -> list[Tensor]:
    """Outputs and gradients in float64."""
    grads = tuple(_wide(g) for g in problem.grads)
    return [x.detach() for x in prepared(problem.truth, tuple(_wide(x) for x in problem.leaves), grads, backward)()]


def checked(
    candidate: Candidate, problem: Problem, expected: list[Tensor], case: Case, device: str
) -> tuple[Callable[[], Any], float]:
    """``candidate`` as a function to time, and its error.

    Raises:
        ValueError: the result is wrong.
    """
    function = prepared(
        candidate.compute,
        problem.leaves if candidate.leaves is None else candidate.leaves,
        problem.grads,
        case.backward,
    )
    results = function()
    error = worst_error(
        candidate.restore(results) if candidate.restore else results, expected, TOLERANCE.get(case.dtype, 0.0)
    )
    del results
    return captured(function) if device == "cuda" and not candidate.synchronizes else function, error


def prepared(
    compute: Callable[..., Any], leaves: tuple[Tensor, ...], grads: tuple[Tensor, ...], backward: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """A function without arguments that returns the outputs and, with ``backward``, the gradients of all leaves."""
    leaves = _leaves(leaves, backward)

    def forward():
        with torch.no_grad():
            return _several(compute(*leaves))

    def forward_backward():
        outputs = _several(compute(*leaves))
        return *outputs, *torch.autograd.grad(outputs, leaves, grads)

    return forward_backward if backward else forward


def worst_error(results: tuple[Tensor, ...], expected: list[Tensor], allowed: float) -> float:
    """The largest ratio of the norm of an error to the norm of its truth.

    Raises:
        ValueError: it exceeds ``allowed`` or is NaN, or a shape differs.
    """
    worst = 0.0
    for result, true in zip(results, expected, strict=True):
        if result.shape != true.shape:
            raise ValueError(f"wrong: shape {tuple(result.shape)}, expected {tuple(true.shape)}")
        size = float(true.double().norm())
        error = float((result.detach().double() - true).norm()) / (size or 1.0)
        if not error <= allowed:
            raise ValueError(f"wrong: error {error:.1e}, at most {allowed:.0e} is right")
        worst = max(worst, error)
    return worst


def failed(row: Row) -> bool:
    """Whether the row is one of ours, at this revision, and was wrong or did not run."""
    return row.missing is not None and (row.candidate == OURS or row.candidate.startswith(f"{OURS}, "))


def _timed(functions, roofline, repeats, seconds, device, notify) -> tuple[dict[str, Timing], float | None]:
    """Timings by candidate, and the median of ``roofline``, which is timed in turn with them."""
    if roofline is not None:
        functions = {**functions, "roofline": roofline}
    notify("warming up", 0)
    turn = sum(timing.median for timing in interleaved(functions, WARMUP, device=device).values())
    repeats = max(repeats, min(MAX_REPEATS, int(seconds / turn)))
    total, done = repeats * len(functions), 0

    def step(name):
        nonlocal done
        notify(f"timing {name}", done / total)
        done += 1

    timings = interleaved(functions, repeats, warmup=0, device=device, notify=step)
    return timings, timings.pop("roofline").median if roofline is not None else None


def _leaves(leaves, backward):
    return tuple(x.detach().requires_grad_(backward) for x in leaves)


def _several(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _wide(x):
    return x.double() if x.is_floating_point() else x
