"""Calls that torch would silently get wrong are refused or computed right, by every operator in every
implementation.
"""

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from operator_cases import CASES, DIFFERENTIABLE, call, impl_fixture, implementations_of
from torch import Tensor
from torch.autograd import forward_ad

from peft_kernels.ops import (
    decomposed_prompt_embedding,
    label_logits,
    prototype_cross_entropy,
    prototype_scores,
    shared_cross_attention,
    special_token_add,
    special_token_add_,
    special_token_slots,
)
from peft_kernels.ops.special_tokens import implementations


@pytest.mark.parametrize("runs", DIFFERENTIABLE, ids="-".join, indirect=True)
def test_second_derivatives_are_refused(runs, device):
    inputs, results = inputs_and_results(runs, device)
    first = torch.autograd.grad(sum(x.pow(2).sum() for x in results), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        sum(x.pow(2).sum() for x in first).backward()


def inputs_and_results(runs, device):
    case = CASES[runs[0]]().to(device)
    inputs = [case.tensors[name].requires_grad_() for name in case.trainable()]
    return inputs, call(*runs, case.tensors, case.options)


@pytest.mark.parametrize("runs", DIFFERENTIABLE, ids="-".join, indirect=True)
def test_forward_mode_is_refused(runs, device):
    case = CASES[runs[0]]().to(device)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode differentiation is not implemented"),
    ):
        duals = {name: forward_ad.make_dual(case.tensors[name], case.tensors[name]) for name in case.trainable()}
        call(*runs, case.tensors | duals, case.options)


def test_implementations_that_cannot_run_are_refused():
    for name, case in ((name, make()) for name, make in CASES.items()):
        with pytest.raises(ValueError, match="impl must be 'auto' or one of .*got 'fast'"):
            call(name, "fast", case.tensors, case.options)
        if "cuda" in implementations_of(case.package).names:
            with pytest.raises(ValueError, match="impl='cuda' cannot run here"):
                call(name, "cuda", case.tensors, case.options)


impl = impl_fixture(implementations, "reference", "cpp", "cuda", "triton")


@pytest.fixture
def vectors(device):
    return torch.randn(2, 8, device=device)


@pytest.fixture
def slots(device):
    return torch.tensor([[1, -1], [0, 2]], device=device)


@pytest.mark.parametrize("layout", ["expanded", "windows"])
def test_memory_that_is_shared_does_not_change_in_place(layout, impl, vectors, slots, device):
    memory = torch.zeros(64, device=device)
    hidden = (
        memory[:32].view(1, 4, 8).expand(2, -1, -1)
        if layout == "expanded"
        else memory.as_strided((2, 4, 8), (32, 4, 1))
    )
    with pytest.raises(ValueError, match="elements of hidden must not share memory"):
        special_token_add_(hidden, vectors, slots, impl=impl)
    assert not memory.any()


def test_strides_without_overlap_are_no_shared_memory(impl, vectors, slots, device):
    hidden = torch.zeros(9, 4, 2, device=device)[:8].permute(2, 1, 0)
    special_token_add_(hidden, vectors, slots, impl=impl)
    assert_within_rounding(
        hidden, lambda: special_token_add(torch.zeros(2, 4, 8, device=device), vectors, slots, impl="reference")
    )


def test_vectors_may_lie_in_what_changes(impl, slots, device):
    hidden = torch.randn(2, 4, 8, device=device)
    before = hidden.clone()
    expected = WithinRounding(lambda: special_token_add(before, before[0, 1:3].clone(), slots, impl="reference"))
    expected.check(special_token_add_(hidden, hidden[0, 1:3], slots, impl=impl))


def test_autograd_notices_a_change_in_place(impl, vectors, slots, device):
    hidden = torch.randn(2, 4, 8, device=device, requires_grad=True) * 1
    saved = hidden.pow(2).sum()
    with torch.no_grad():
        special_token_add_(hidden, vectors, slots, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_an_inference_tensor_changes_in_inference_mode_alone(impl, vectors, slots, device):
    with torch.inference_mode():
        hidden = torch.zeros(2, 4, 8, device=device)
        special_token_add_(hidden, vectors, slots, impl=impl)
    assert hidden.any()
    with pytest.raises(ValueError, match="is an inference tensor"):
        special_token_add_(hidden, vectors, slots, impl=impl)


@pytest.mark.parametrize("columns", [3, 300])
def test_slots_that_name_a_position_twice(columns, impl, vectors, device, monkeypatch):
    """Implementations would differ: some add both vectors, some either."""
    monkeypatch.setenv("PEFT_KERNELS_DEBUG", "1")
    slots = torch.full((2, columns), -1, device=device)
    slots[0, 0], slots[1, 0] = 1, 3
    hidden = torch.zeros(2, 4, 8, device=device)
    special_token_add(hidden, vectors, slots, impl=impl)
    slots[1, 2] = 3
    with pytest.raises(ValueError, match=r"slots must have every position of a row once, got \[3, -1, 3"):
        special_token_add(hidden, vectors, slots, impl=impl)


def test_numbers_that_are_none(device):
    hidden, vectors, slots = (
        torch.zeros(1, 2, 4, device=device),
        torch.zeros(1, 4, device=device),
        torch.tensor([[0]], device=device),
    )
    with pytest.raises(TypeError, match="seed must be an integer or a tensor, got a float"):
        special_token_add(hidden, vectors, slots, dropout_p=0.5, seed=1.5)
    with pytest.raises(ValueError, match=r"seed must lie in \[-2\*\*63, 2\*\*63\)"):
        special_token_add(hidden, vectors, slots, dropout_p=0.5, seed=2**63)
    with pytest.raises(TypeError, match="special_ids must be integers, got 1.5"):
        special_token_slots(slots, [1.5], max_slots=1)
    with pytest.raises(TypeError, match="special_ids must be integers, got None"):
        special_token_slots(slots, [1, None], max_slots=1)


def scale_of(operator: str, x: Tensor, device):
    """Call ``operator`` with ``x`` as its scale or weight."""
    like = {"device": device}
    if operator == "shared_cross_attention":
        return shared_cross_attention(*(torch.randn(1, 1, 2, 4, **like) for _ in range(3)), scale=x)
    if operator == "decomposed_prompt_embedding":
        parameters = (torch.randn(*size, **like) for size in ((3, 4), (1, 4), (2, 1), (1, 4)))
        return decomposed_prompt_embedding(torch.tensor([[0, 1]], **like), *parameters, scale=x)
    tensors = [torch.randn(*size, **like) for size in ((2, 4), (3, 4), (2, 3), (2,), (2, 2))]
    return prototype_scores(*tensors, weight=x)


@pytest.mark.parametrize("operator", ["shared_cross_attention", "decomposed_prompt_embedding", "prototype_scores"])
def test_a_learned_scale_is_refused(operator, device):
    scale_of(operator, torch.tensor(0.5), device)
    with pytest.raises(ValueError, match="must be a number, to which no gradient goes"):
        scale_of(operator, torch.tensor(0.5, requires_grad=True), device)


def test_autocast_does_not_lower_what_is_promised_in_float32(device):
    """Library matmuls in operators that fix their own dtype."""
    like = {"device": device}
    features, projection, prototypes, radius = (torch.randn(*size, **like) for size in ((5, 8), (6, 8), (3, 6), (3,)))
    labels, ids, table = (
        torch.tensor([0, 1, 2, 1, 0], **like),
        torch.tensor([[1, 2, 0]], **like),
        torch.randn(9, 8, **like),
    )
    prompt, a, b = (torch.randn(*size, **like) for size in ((2, 8), (4, 3), (3, 8)))

    def results():
        return (
            prototype_scores(features, projection, prototypes, radius),
            prototype_cross_entropy(features, projection, prototypes, radius, None, labels),
            label_logits(features, table, ids, impl="reference"),
            decomposed_prompt_embedding(ids, table, prompt, a, b, impl="reference"),
        )

    expected = WithinRounding(results)
    with torch.autocast(device.type, torch.bfloat16):
        expected.check(results())


def test_meta_tensors_have_shapes():
    query, key = (torch.empty(n, 2, 3, 16, device="meta") for n in (4, 2))
    assert shared_cross_attention(query, key, key).shape == query.shape
