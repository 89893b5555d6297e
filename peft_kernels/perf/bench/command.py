"""The command that measures operators: parses the request, shows a progress bar and a table for each case, and writes
the files.
"""

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from ... import ops
from ...ops.problem import Operator
from ...ops.registry import operator
from ..interruption import Keeping
from ..measure import peaks
from ..progress import progress_bar
from ..results import Row, device_name, measured
from ..tables import table
from .revision import Checkout, running
from .runner import Case, cases_of, compare, failed, rate_dtype

# time per case; short candidates are repeated more often, as their times scatter most
SECONDS, QUICK_SECONDS = (
    3.0,
    1.0,
)
PHASES = {"forward": [False], "backward": [True], "both": [False, True]}


def run(
    wanted: Sequence[Case],
    device: str,
    repeats: int,
    quick: bool,
    out: Path,
    console: Console,
    against: Checkout | None = None,
) -> bool:
    """Measure, show and write; False if our operator was wrong or failed."""
    console.print(f"on: {device_name(device)}, {torch.get_num_threads()} threads")
    limits = {
        dtype: peaks(getattr(torch, dtype), device)
        for dtype in dict.fromkeys(rate_dtype(case.dtype) for case in wanted)
    }
    for dtype, limit in limits.items():
        console.print(f"{dtype}: {limit}")
    rows: list[Row] = []
    revisions = nullcontext() if against is None else starting(against, device, console)
    with Keeping(rows) as kept, revisions as revision, progress_bar(console, len(wanted)) as step:
        for i, case in enumerate(wanted):
            case_rows = compare(
                case,
                device,
                limits[rate_dtype(case.dtype)],
                repeats=repeats,
                revision=revision,
                seconds=QUICK_SECONDS if quick else SECONDS,
                notify=lambda step_name, share, i=i, case=case: step(f"{case}: {step_name}", i + share),
            )
            rows += case_rows
            console.print(table(case_rows))
    path = measured(rows, device, limits, kept.partial).write(out / "operators.json")
    console.print(f"written: {path} and {path.with_suffix('.csv').name}")
    kept.end(console)
    failures = [row for row in rows if failed(row)]
    for row in failures:
        console.print(
            f"[bold red]{row.candidate} failed[/bold red], {row.benchmark}, {row.dtype}, {row.phase}, {row.shape}:"
            f" {escape(row.missing)}"
        )
    return not failures


def asked(
    names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[str], phase: str, quick: bool, console: Console
) -> list[Case]:
    """The cases to be measured.

    Raises:
        ValueError: an operator, shape or dtype that does not exist.
    """
    operators = [operator(name) for name in dict.fromkeys(names or ops.__all__)]
    if shapes and len(operators) != 1:
        raise ValueError(f"--shapes needs exactly one operator, whose letters it uses; got {len(operators)} operators")
    cases = []
    for op in operators:
        sizes = [parsed(text, op) for text in shapes] or list(op.quick_shapes if quick else op.shapes)
        operator_cases = cases_of(
            op,
            sizes,
            op.dtypes if op.is_integer else list(dict.fromkeys(dtypes)) or op.default_dtypes,
            PHASES[phase],
        )
        if not operator_cases:
            lacks = (
                f"{op.name} has {', '.join(op.dtypes)}{'' if op.has_backward else ' and no backward pass'}:"
                " nothing to measure"
            )
            if names:
                raise ValueError(lacks)
            console.print(lacks)
        cases += operator_cases
    return cases


def parsed(text: str, op: Operator) -> dict[str, int]:
    """Parse ``"B=16,L=256"`` into sizes, in the operator's order of letters.

    Raises:
        ValueError: other letters than the operator's, or sizes that are not positive integers.
    """
    sizes = {}
    for part in text.split(","):
        letter, _, size = (x.strip() for x in part.partition("="))
        if letter not in op.letters or letter in sizes or not size.isdecimal() or not int(size):
            raise ValueError(
                f"--shapes of {op.name} must be {','.join(f'{x}=<size>' for x in op.letters)}; got {part!r} in {text!r}"
            )
        sizes[letter] = int(size)
    if missing := [letter for letter in op.letters if letter not in sizes]:
        raise ValueError(
            f"--shapes of {op.name} must be {','.join(f'{x}=<size>' for x in op.letters)}; {text!r} has no"
            f" {', '.join(missing)}"
        )
    return {letter: sizes[letter] for letter in op.letters}


@contextmanager
def starting(against: Checkout, device: str, console: Console):
    """Start the other revision; says so, because its library may have to be built."""
    with ExitStack() as stack:
        with console.status(f"preparing {against.ref}"):
            revision = stack.enter_context(running(against, device))
        yield revision
