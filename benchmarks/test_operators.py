"""The operators and baselines of ``peft-kernels bench`` for pytest-benchmark, which keeps histories and compares them.

    pytest benchmarks/ -k "shared_cross_attention and float32" [--benchmark-quick] [--benchmark-device cuda] [--benchmark-autosave]

A group is one problem, its tests are the ways to solve it, checked before they are timed. What cannot run here is skipped with its reason.
Ratios are better taken from ``peft-kernels bench``, where the ways take turns.
"""

from functools import lru_cache

import pytest
import torch

from peft_kernels.perf.bench import problems as cases
from peft_kernels.perf.bench.runner import Thing, checked, first_line, things, truth, ways
from peft_kernels.perf.results import OURS


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    device, quick = option("--benchmark-device"), option("--benchmark-quick")
    found = []
    for operator in map(cases.operator, cases.NAMES):
        small = {v: Thing(operator, operator.quick_shapes[0], v, operator.dtypes[0], False).problem(device) for v in operator.variants}
        for thing in things(operator, operator.quick_shapes if quick else operator.shapes, operator.default_dtypes, [False, True]):
            # the names of the ways do not depend on the shape
            found += [pytest.param(thing, way, device, id=f"{thing}, {way}") for way in ways(thing, small[thing.variant], device)]
    metafunc.parametrize(("thing", "way", "device"), found)


@lru_cache(maxsize=1)
def solved(operator: str, shape: tuple, variant: str, dtype: str, backward: bool, device: str):
    """The problem of a group and its truth."""
    torch.compiler.reset()
    thing = Thing(cases.operator(operator), dict(shape), variant, dtype, backward)
    problem = thing.problem(device)
    return problem, truth(problem, backward), ways(thing, problem, device)


def test_operator(benchmark, thing, way, device):
    problem, expected, prepare = solved(thing.operator.name, tuple(thing.shape.items()), thing.variant, thing.dtype, thing.backward, device)
    try:
        function, error = checked(prepare[way](), problem, expected, thing, device)
    except Exception as reason:
        if way == OURS:
            raise
        pytest.skip(first_line(reason))
    benchmark.group, benchmark.name = str(thing), way
    benchmark.extra_info["error"] = error
    if device == "cuda":
        benchmark(lambda: (function(), torch.cuda.synchronize()))
    else:
        benchmark(function)
