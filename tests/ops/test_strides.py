"""Vectors and small matrices with any strides give the results of contiguous ones, for every operator in every
implementation.
"""

import pytest
import torch
from accuracy import WithinRounding
from operator_cases import CASES, PAIRS, expected_of, implementations_of, run
from torch import Tensor


def column(x):
    """One of three columns; the others are 0, which a kernel that ignores the stride would read."""
    wide = x.new_zeros(*x.shape, 3)
    wide[..., 0] = x
    return wide[..., 0]


def every_second(x):
    return x.repeat_interleave(2, 0)[::2]


def expanded(x):
    """The first row, expanded to all rows; 0 follows it in memory."""
    return torch.cat([x[:1], torch.zeros_like(x)])[:1].expand(x.shape)


LAYOUTS = [column, every_second, expanded]


def laid_out(case, layout, dtype, device):
    """The case with its arguments in ``layout``."""
    result = {}
    for key, x in case.tensors.items():
        x = x.to(device) if x.is_floating_point() or key in ("seed", "labels") else x.to(device, dtype)
        result[key] = layout(x) if key in case.laid_out and not (layout is expanded and key in case.varying) else x
    return case._replace(tensors=result)


def dense(case):
    return case._replace(tensors={key: x.contiguous() for key, x in case.tensors.items()})


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


class Recorder:
    """An implementation that records its calls."""

    def __init__(self, implementation):
        self.implementation, self.calls = implementation, []

    def __getattr__(self, name):
        found = getattr(self.implementation, name)
        if not callable(found) or name == "unavailable":
            return found

        def called(*arguments):
            copies = [
                x.detach().clone(memory_format=torch.preserve_format) if isinstance(x, Tensor) else x for x in arguments
            ]
            self.calls.append((found, copies))
            return found(*arguments)

        return called


def recorded_calls(name, impl, case, device, monkeypatch):
    """The functions of an implementation that an operator calls, forward and backward, and their arguments; integers
    are int32.
    """
    package = implementations_of(case.package)
    recorder = Recorder(package.module(impl))
    with monkeypatch.context() as patch:
        patch.setattr(package, "module", lambda _: recorder)
        run(name, impl, laid_out(case, torch.Tensor.contiguous, torch.int32, device))
    assert recorder.calls
    return recorder.calls


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
