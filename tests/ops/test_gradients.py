"""Gradients of every operator in every implementation: they are right, bit-equal when repeated, and compile."""

from itertools import combinations

import pytest
import torch
from operator_cases import CASES, DIFFERENTIABLE, call, expected_of, implementations_of, run

LARGE = {  # work for several threads; by default 64 rows of 20 tokens
    "shared_cross_attention": {"batch": 6, "length": 130, "width": 24},
    "label_logits": {"batch": 70, "length": 3, "classes": 120, "vocabulary": 400},
    "prototype_scores": {"batch": 700},
    "prototype_cross_entropy": {"batch": 700},
}


def random_like(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(x.ndim)).to(x)


@pytest.mark.parametrize("runs", [pair for pair in DIFFERENTIABLE if pair[1] != "triton"], ids="-".join, indirect=True)
def test_frozen_tensors_get_nothing(runs, device):
    """Gradients of one or two tensors are those of all."""
    case = CASES[runs[0]]().to(device)
    expected = expected_of(runs[0], case)
    for wanted in (names for count in (1, 2) for names in combinations(case.trainable(), count)):
        results = run(*runs, case, wanted=wanted)
        assert {name for name in results if not name.startswith("result")} == set(wanted)
        expected.check(results, partial=True)


LAYOUTS = [
    lambda x: x.mT.contiguous().mT,
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: x.repeat_interleave(2, -1)[..., ::2],
]


@pytest.mark.parametrize("runs", DIFFERENTIABLE, ids="-".join, indirect=True)
def test_strides_of_the_gradient(runs, device):
    case = CASES[runs[0]]().to(device)
    # ``sum().backward()`` passes on a gradient with strides of 0
    expected_of(runs[0], case).check(run(*runs, case, of=lambda x: x.new_ones(()).expand(x.shape)))
    expected = expected_of(runs[0], case, random_like)
    for layout in LAYOUTS:
        expected.check(run(*runs, case, lambda x, layout=layout: layout(random_like(x)) if x.ndim else random_like(x)))


@pytest.mark.parametrize(
    "runs",
    [pair for pair in DIFFERENTIABLE if pair[0] != "label_logits of rows" and pair[1] != "triton"],
    ids="-".join,
    indirect=True,
)
def test_ten_repeats_are_bit_equal(runs, device):
    name, impl = runs
    case = CASES[name](**LARGE.get(name, {"batch": 64, "length": 20, "width": 72}))
    for dtype in (torch.float32,) if case.package == "prototype_scores" else (torch.float32, torch.bfloat16):
        if implementations_of(case.package).unavailable(impl, device.type, dtype) is None:
            typed = case.to(device, dtype)
            first, *others = (run(*runs, typed, random_like) for _ in range(10))
            assert all(torch.equal(x, results[key]) for results in others for key, x in first.items())


VARIANTS = [
    ("label_cross_attention", {}),
    ("label_cross_attention of joined rows", {}),
    *(("label_logits", {"reduce": reduce}) for reduce in ("max", "mean", "logsumexp")),
    ("prototype_scores", {"weight": 0.3}),
    ("prototype_cross_entropy", {"weight": 0.3}),
    ("special_token_add", {}),
    ("special_token_add_", {}),
    *((name, {"rms": rms}) for name in ("add_layer_norm_inject", "add_inject_layer_norm") for rms in (False, True)),
    *(("decomposed_prompt_embedding of low rank", {"scale": 0.5, "insert_after_first": x}) for x in (False, True)),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_gradcheck(name, options):
    case = CASES[name](width=4).to("cpu", torch.float64)
    names = case.trainable()

    def function(*leaves):
        return call(name, "auto", case.tensors | dict(zip(names, leaves)), case.options | options)

    assert torch.autograd.gradcheck(function, [case.tensors[key].requires_grad_() for key in names])


# the first has tests of its own, the others are other arguments of the same operators
ELSEWHERE = ("shared_cross_attention", "label_logits of rows", "decomposed_prompt_embedding")
COMPILED = [(name, impl) for name in CASES if name not in ELSEWHERE for impl in ("auto", "reference")]
COMPILED += [(name, impl) for name in CASES if "label_cross" in name for impl in ("explicit", "matmul")]


@pytest.mark.parametrize("runs", COMPILED, ids="-".join, indirect=True)
def test_compiles_with_dynamic_shapes(runs):
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((4, 6), (3, 9)):
        case = CASES[runs[0]](batch=batch, length=length)
        expected_of(runs[0], case).check(run(*runs, case, call=compiled))
