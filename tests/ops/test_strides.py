"""Vectors and small matrices of any strides, every operator in every implementation: the results of contiguous ones, bit for bit."""

from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from peft_kernels import ops


class Case(NamedTuple):
    """``tensors``: all arguments; ``laid_out``: those whose strides change; ``varying``: those that no stride of 0 fits."""

    package: str
    tensors: dict[str, Tensor]
    laid_out: tuple[str, ...]
    options: dict = {}
    varying: tuple[str, ...] = ()


def integers(*values):
    return torch.tensor(values)


def attention():
    keys = {"key": torch.randn(3, 1, 7, 16), "value": torch.randn(3, 1, 7, 16)}
    vectors = {"key_lengths": integers(7, 2, 5), "encoder_index": integers(0, 0, 1, 1, 2, 2)}
    return Case("shared_cross_attention", {"query": torch.randn(6, 1, 3, 16), **keys, **vectors}, tuple(vectors), {"return_lse": True})


def label_attention(**rows):
    features = torch.randn(3, 7, 32) if "lengths" in rows else torch.randn(11, 32)
    weights = {name: torch.randn(32, 32) for name in ("w_q", "w_k", "w_v")}
    options = {"num_heads": 2}
    return Case("label_cross_attention", {"slots": torch.randn(3, 32), "features": features, **weights, **rows}, tuple(rows), options, ("offsets",))


def words(**rows):
    vectors = {"label_ids": integers(*[4, 1, 7], *[2, 5, 0]).view(2, 3), "bias": torch.randn(9), **rows}
    hidden = torch.randn(3, 5, 24) if rows else torch.randn(3, 24)
    return Case("label_logits", {"hidden": hidden, "weight": torch.randn(9, 24), **vectors}, tuple(vectors), {"reduce": "logsumexp"})


def scores(**labels):
    vectors = {"radius": torch.randn(3), "scores": torch.randn(4, 3), **labels}
    large = {"features": torch.randn(4, 8), "projection": torch.randn(5, 8), "prototypes": torch.randn(3, 5)}
    return Case("prototype_scores", {**large, **vectors}, tuple(vectors))


def special_ids():
    vectors = {"input_ids": integers(1, 5, 2, 9, 5, 2, 1, 7, 8, 2, 2, 3).view(2, 6), "special_ids": integers(1, 2, 9)}
    vectors["attention_mask"] = integers(1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1).view(2, 6)
    return Case("special_tokens", vectors, tuple(vectors), {"max_slots": 4})


INJECTED = {"slots": integers(0, 3, 5, -1, 2, 1).view(3, 2), "adapter_ids": integers(1, 0, -1)}


def injection(package="special_tokens", options={"dropout_p": 0.3}, **large):  # noqa: B006
    vectors = {"vectors": torch.randn(2, 2, 20), "seed": integers(12345678901), **INJECTED}
    if package == "add_layer_norm_inject":
        vectors |= {"weight": torch.randn(20), "bias": torch.randn(20)}
    return Case(package, {**{name: torch.randn(3, 6, 20) for name in large or ("hidden",)}, **vectors}, tuple(vectors), options)


def norm():
    return injection("add_layer_norm_inject", x=True, residual=True)


def embedding():
    rows = {
        "input_ids": integers(*[3, 1, 7, 4], *[2, 6, 0, 5], *[1, 1, 3, 8]).view(3, 4),
        "offsets": integers(0, 3, 1),
        "adapter_ids": integers(1, -1, 0),
    }
    parameters = {"prompt": torch.randn(2, 3, 24), "delta": torch.randn(2, 5, 24)}
    return Case("decomposed_prompt_embedding", {"weight": torch.randn(9, 24), **rows, **parameters}, (*rows, *parameters))


CASES = {
    "shared_cross_attention": attention,
    "label_cross_attention": lambda: label_attention(lengths=integers(7, 2, 5)),
    "label_cross_attention of joined rows": lambda: label_attention(offsets=integers(0, 3, 3, 11)),
    "label_logits": lambda: words(positions=integers(4, 0, 2)),
    "label_logits of rows": words,
    "prototype_scores": scores,
    "prototype_cross_entropy": lambda: scores(labels=integers(2, 0, 1, 1)),
    "special_token_slots": special_ids,
    "special_token_add": injection,
    "special_token_add_": injection,
    "add_layer_norm_inject": norm,
    "add_inject_layer_norm": norm,
    "decomposed_prompt_embedding": embedding,
}


def column(x):
    """One of three columns, the others 0: what a kernel that ignores the stride takes for values."""
    wide = x.new_zeros(*x.shape, 3)
    wide[..., 0] = x
    return wide[..., 0]


def every_second(x):
    return x.repeat_interleave(2, 0)[::2]


def expanded(x):
    """The first row for all; 0 lies behind it."""
    return torch.cat([x[:1], torch.zeros_like(x)])[:1].expand(x.shape)


LAYOUTS = [column, every_second, expanded]


def implementations_of(package):
    return import_module(f"peft_kernels.ops.{package}").implementations


PAIRS = [(name, impl) for name, case in CASES.items() for impl in implementations_of(case().package).names]


@pytest.fixture
def runs(request, device):
    name, impl = request.param
    package = CASES[name]().package
    if reason := implementations_of(package).unavailable(impl, device.type, torch.float32):
        pytest.skip(reason)
    return name, impl


def gradients(results, inputs, of=torch.ones_like):
    results = [x for x in results if x.requires_grad]
    return torch.autograd.grad(results, inputs, [of(x) for x in results], allow_unused=True) if results and inputs else ()


def run(name, impl, tensors, options, of=torch.ones_like):
    """Results and gradients. Leaves keep the strides of what they stand for."""
    tensors = {key: x.detach().requires_grad_(key not in ("features", "scores")) if x.is_floating_point() else x for key, x in tensors.items()}
    if name == "prototype_cross_entropy":
        tensors["prototypes"] = tensors["prototypes"].detach()
    given = dict(tensors)
    if name == "special_token_add_":
        given["hidden"] = tensors["hidden"] * 1
    results = getattr(ops, name.split()[0])(**given, **options, impl=impl)
    results = results if isinstance(results, tuple) else (results,)
    return *results, *gradients(results, [x for x in tensors.values() if x.requires_grad], of)


def equal(result, expected):
    """None: no gradient. NaN, which nothing here gives, equals nothing."""
    return torch.equal(result, expected) if isinstance(expected, Tensor) else result is expected


def laid_out(case, layout, dtype, device):
    """The arguments in this layout."""
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
    plain = run(*runs, laid_out(case, torch.Tensor.contiguous, torch.int64, device), case.options)
    constant = run(*runs, dense(laid_out(case, expanded, torch.int64, device)), case.options)
    for layout in LAYOUTS:
        for dtype in (torch.int32, torch.int64):
            results = run(*runs, laid_out(case, layout, dtype, device), case.options)
            assert all(map(equal, results, constant if layout is expanded else plain)), (layout.__name__, dtype)


@pytest.mark.parametrize("runs", PAIRS, ids=by_name, indirect=True)
def test_gradients_of_a_sum_are_those_of_ones(runs, device):
    """What ``sum().backward()`` hands on has strides of 0. Products by the library may round another layout differently."""
    case = CASES[runs[0]]()
    plain = laid_out(case, torch.Tensor.contiguous, torch.int64, device)
    expected = run(*runs, plain, case.options)
    results = run(*runs, plain, case.options, of=lambda x: x.new_ones(()).expand(x.shape))
    torch.testing.assert_close(results, expected, equal_nan=False)


class Recorder:
    """An implementation whose calls are kept."""

    def __init__(self, implementation):
        self.implementation, self.calls = implementation, []

    def __getattr__(self, name):
        found = getattr(self.implementation, name)
        if not callable(found) or name == "unavailable":
            return found

        def called(*arguments):
            copies = [x.detach().clone(memory_format=torch.preserve_format) if isinstance(x, Tensor) else x for x in arguments]
            self.calls.append((found, copies))
            return found(*arguments)

        return called


@pytest.mark.parametrize("runs", PAIRS, ids=by_name, indirect=True)
def test_implementation_honours_strides_of_integers(runs, device, monkeypatch):
    """Below the operator: each takes index vectors as they are."""
    name, impl = runs
    case = CASES[name]()
    package = implementations_of(case.package)
    recorder = Recorder(package.module(impl))
    with monkeypatch.context() as patch:
        patch.setattr(package, "module", lambda _: recorder)
        run(name, impl, laid_out(case, torch.Tensor.contiguous, torch.int32, device), case.options)
    assert recorder.calls
    for function, arguments in recorder.calls:
        results = []
        for layout in (torch.Tensor.contiguous, column):
            given = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
            given = [layout(x) if isinstance(x, Tensor) and x.ndim and not x.is_floating_point() else x for x in given]
            result = function(*given)
            results.append(result if isinstance(result, tuple) else (given[0] if result is None else result,))
        assert all(map(equal, *results)), function.__name__
