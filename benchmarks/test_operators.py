"""The operators and baselines of ``peft-kernels bench`` for pytest-benchmark, which keeps a history and compares runs.

    pytest benchmarks/ -k "shared_cross_attention and float32" [--benchmark-quick] [--benchmark-device cuda]
    [--benchmark-autosave]

A group is one problem; its tests are the candidates, checked before they are timed. Candidates that cannot run here are
skipped with a reason. For ratios prefer ``peft-kernels bench``, where the candidates take turns.
"""

from functools import lru_cache

import pytest
import torch

from peft_kernels import ops
from peft_kernels.ops.registry import operator
from peft_kernels.perf.bench.runner import Case, candidates, cases_of, checked, truth
from peft_kernels.perf.results import OURS, first_line


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    device, quick = option("--benchmark-device"), option("--benchmark-quick")
    parameters = []
    for op in map(operator, ops.__all__):
        small = {v: Case(op, op.quick_shapes[0], v, op.dtypes[0], False).problem(device) for v in op.variants}
        for case in cases_of(op, op.quick_shapes if quick else op.shapes, op.default_dtypes, [False, True]):
            # the names of the candidates do not depend on the shape
            parameters += [
                pytest.param(case, candidate, device, id=f"{case}, {candidate}")
                for candidate in candidates(case, small[case.variant], device)
            ]
    metafunc.parametrize(("case", "candidate", "device"), parameters)


@lru_cache(maxsize=1)
def solved(name: str, shape: tuple, variant: str, dtype: str, backward: bool, device: str):
    """The problem of a group and its truth."""
    torch.compiler.reset()
    case = Case(operator(name), dict(shape), variant, dtype, backward)
    problem = case.problem(device)
    return problem, truth(problem, backward), candidates(case, problem, device)


def test_operator(benchmark, case, candidate, device):
    problem, expected, prepare = solved(
        case.operator.name, tuple(case.shape.items()), case.variant, case.dtype, case.backward, device
    )
    try:
        function, error = checked(prepare[candidate](), problem, expected, case, device)
    except Exception as reason:
        if candidate == OURS:
            raise
        pytest.skip(first_line(reason))
    benchmark.group, benchmark.name = str(case), candidate
    benchmark.extra_info["error"] = error
    if device == "cuda":
        benchmark(lambda: (function(), torch.cuda.synchronize()))
    else:
        benchmark(function)
