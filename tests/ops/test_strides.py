"""Vectors and small matrices with any strides give the results of contiguous ones, for every operator in every
implementation.
"""

import pytest
import torch
from accuracy import WithinRounding
from against_reference import widened
from operator_cases import CASES, PAIRS, implementations_of
from torch import Tensor

from peft_kernels import ops


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


@pytest.fixture
def runs(request, device):
    name, impl = request.param
    package = CASES[name]().package
    if reason := implementations_of(package).unavailable(impl, device.type, torch.float32):
        pytest.skip(reason)
    return name, impl


def gradients(results, inputs, of=torch.ones_like):
    results = [x for x in results if x.requires_grad]
    return (
        torch.autograd.grad(results, inputs, [of(x) for x in results], allow_unused=True) if results and inputs else ()
    )


def run(name, impl, tensors, options, of=torch.ones_like):
    """Results and gradients. Leaves keep the strides of the tensors that they replace."""
    tensors = {
        key: x.detach().requires_grad_(key not in ("features", "scores")) if x.is_floating_point() else x
        for key, x in tensors.items()
    }
    if name == "prototype_cross_entropy":
        tensors["prototypes"] = tensors["prototypes"].detach()
    given = dict(tensors)
    if name == "special_token_add_":
        given["hidden"] = tensors["hidden"] * 1
    results = getattr(ops, name.split()[0])(**given, **options, impl=impl)
    results = results if isinstance(results, tuple) else (results,)
    return *results, *gradients(results, [x for x in tensors.values() if x.requires_grad], of)


def expected_of(name, tensors, options):
    """The reference's results from contiguous tensors. None: no gradient."""
    return WithinRounding(
        lambda: run(name, "reference", tensors, options), run(name, "reference", widened(tensors), options)
    )


def laid_out(case, layout, dtype, device):
    """The case's arguments in ``layout``."""
    result = {}
    for key, x in case.tensors.items():
        x = x.to(device) if x.is_floating_point() or key in ("seed", "labels") else x.to(device, dtype)
        result[key] = layout(x) if key in case.laid_out and not (layout is expanded and key in case.varying) else x
    return result


def dense(tensors):
    return {key: x.contiguous() for key, x in tensors.items()}


def by_name(pair):
    return "-".join(pair)


@pytest.mark.parametrize("runs", PAIRS, ids=by_name, indirect=True)
def test_operator_honours_strides(runs, device):
    case = CASES[runs[0]]()
    plain = expected_of(runs[0], laid_out(case, torch.Tensor.contiguous, torch.int64, device), case.options)
    constant = expected_of(runs[0], dense(laid_out(case, expanded, torch.int64, device)), case.options)
    for layout in LAYOUTS:
        for dtype in (torch.int32, torch.int64):
            (constant if layout is expanded else plain).check(
                run(*runs, laid_out(case, layout, dtype, device), case.options)
            )


@pytest.mark.parametrize("runs", PAIRS, ids=by_name, indirect=True)
def test_gradients_of_a_sum_are_those_of_ones(runs, device):
    """``sum().backward()`` passes on a gradient with strides of 0."""
    case = CASES[runs[0]]()
    plain = laid_out(case, torch.Tensor.contiguous, torch.int64, device)
    results = run(*runs, plain, case.options, of=lambda x: x.new_ones(()).expand(x.shape))
    expected_of(runs[0], plain, case.options).check(results)


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
        run(name, impl, laid_out(case, torch.Tensor.contiguous, torch.int32, device), case.options)
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
