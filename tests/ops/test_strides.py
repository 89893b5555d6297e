"""Vectors and small matrices with any strides give the results of contiguous ones, for every operator in every
implementation.
"""

import pytest
import torch
from accuracy import WithinRounding
from layouts import LAYOUTS, dense, expanded, laid_out, recorded_calls
from operator_cases import CASES, PAIRS, expected_of, run
from torch import Tensor


def by_name(pair):
    return "-".join(pair)


@pytest.mark.parametrize("runs", PAIRS, ids=by_name, indirect=True)
def test_operator_honours_strides(runs, device):
    case = CASES[runs[0]]()
    plain = expected_of(runs[0], laid_out(case, torch.Tensor.contiguous, torch.int64, device))
    constant = expected_of(runs[0], dense(laid_out(case, expanded, torch.int64, device)))
    for layout in LAYOUTS:
        for dtype in (torch.int32, torch.int64):
            (constant if layout is expanded else plain).check(run(*runs, laid_out(case, layout, dtype, device)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("runs", PAIRS, ids=by_name, indirect=True)
def test_implementation_honours_strides_of_integers(runs, layout, device, monkeypatch):
    """Below the operator: each implementation accepts index vectors with any stride."""
    case = CASES[runs[0]]()
    for function, arguments in recorded_calls(*runs, case, device, monkeypatch):

        def laid(x):
            varies = layout is expanded and x.shape in [case.tensors[key].shape for key in case.varying]
            return layout(x) if x.ndim and not x.is_floating_point() and not varies else x.clone()

        def results(layout, function=function, arguments=arguments):
            given = [layout(laid(x)) if isinstance(x, Tensor) else x for x in arguments]
            result = function(*given)
            return given[0] if result is None else result

        WithinRounding(lambda results=results: results(torch.Tensor.contiguous)).check(results(lambda x: x))
