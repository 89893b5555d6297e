"""Tests of both GPU implementations; their test files import this module and define a fixture ``implementation``."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from accuracy import assert_within_rounding
from against_reference import assert_like, expected_of

from peft_kernels.ops.decomposed_prompt_embedding import decomposed_prompt_embedding, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Problem(NamedTuple):
    batch: int
    length: int
    virtual: int
    rank: int
    width: int
    adapters: int = 1
    more_positions: int = 0
    offsets: bool = False
    chosen: bool = False  # adapter_ids, -1 among them
    first: bool = False  # the prompt follows the first token
    given: bool = False  # delta in place of a and b
    strided: bool = False
    integer: torch.dtype = torch.int64

    def make(self, dtype, device):
        """The arguments of forward, and grad."""

        def random(*shape):
            wide = torch.randn(*shape[:-1], shape[-1] * (2 if self.strided else 1), dtype=torch.float64)
            return wide.to(device, torch.float32)[..., :: 2 if self.strided else 1]

        def integers(low, high, *shape):
            spread = torch.randint(low, high, (*shape, 2 if self.strided else 1), device=device, dtype=self.integer)
            return spread[..., 0]

        positions = self.length + self.more_positions
        weight, grad = (
            random(23, self.width).to(dtype),
            random(self.batch, self.virtual + self.length, self.width).to(dtype),
        )
        prompt = random(self.adapters, self.virtual, self.width)
        a, b, delta = random(self.adapters, positions, self.rank), random(self.adapters, self.rank, self.width), None
        if self.given:
            a, b, delta = None, None, random(self.adapters, positions, self.width)
        input_ids = (
            integers(0, 23, self.length, self.batch).T if self.strided else integers(0, 23, self.batch, self.length)
        )
        offsets = integers(0, self.length + 1, self.batch) if self.offsets else None
        adapter_ids = integers(-1, self.adapters, self.batch) if self.chosen else None
        return (input_ids, weight, prompt, a, b, delta, 0.7, 1.3, offsets, self.first, adapter_ids), grad


PROBLEMS = {
    "plain": Problem(3, 37, 5, 7, 128),
    "wide, several tiles": Problem(5, 67, 35, 45, 264, more_positions=5),
    "padded on the left": Problem(4, 35, 3, 7, 100, offsets=True),
    "after the first": Problem(3, 19, 4, 30, 24, first=True, offsets=True),
    "adapters": Problem(9, 13, 6, 5, 136, adapters=3, chosen=True, offsets=True, more_positions=3),
    "adapters, after the first": Problem(20, 3, 2, 17, 40, adapters=16, chosen=True, first=True, integer=torch.int32),
    "one adapter or none": Problem(5, 8, 3, 4, 48, chosen=True),
    "delta": Problem(3, 21, 4, 0, 136, given=True, offsets=True, more_positions=2),
    "delta, adapters": Problem(7, 9, 4, 0, 96, adapters=4, chosen=True, given=True),
    "strided": Problem(4, 11, 3, 6, 40, adapters=2, chosen=True, offsets=True, strided=True, integer=torch.int32),
    "strided, int64": Problem(4, 11, 3, 6, 40, adapters=2, chosen=True, offsets=True, strided=True),
    "width 1": Problem(3, 5, 2, 1, 1),
    "no prompt": Problem(3, 18, 0, 3, 100, offsets=True),
    "no tokens": Problem(3, 0, 4, 3, 24, more_positions=2),
    "many rows": Problem(70, 2, 1, 2, 8, adapters=2, chosen=True),
}


def all_results(impl, arguments, grad, needs=(True, True)):
    prompt, a, delta, offsets, first, adapter_ids = (arguments[i] for i in (2, 3, 5, 8, 9, 10))
    sizes = *prompt.shape[:2], (a if delta is None else delta).shape[1]
    grads = impl.backward(grad, *sizes, offsets, first, adapter_ids, *needs)
    return {"out": impl.forward(*arguments), **dict(zip(("grad_prompt", "grad_delta"), grads))}


def check_all(implementation, *arguments):
    for name, x in assert_like(reference, implementation, all_results, *arguments).items():
        assert x is None or x.is_contiguous(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_worse_than_torch(problem, dtype, implementation, poisoned, device):
    check_all(implementation, *PROBLEMS[problem].make(dtype, device))


@pytest.mark.parametrize("problem", ["one adapter or none", "after the first"])
def test_repeats_are_bit_equal(problem, implementation, poisoned, device):
    tensors = PROBLEMS[problem].make(torch.float16, device)
    first = all_results(implementation, *tensors)
    for _ in range(9):
        for name, result in all_results(implementation, *tensors).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True)])
def test_only_what_is_asked_for(needs, implementation, poisoned, device):
    check_all(implementation, *PROBLEMS["adapters"].make(torch.float32, device), needs)


def test_rows_without_an_adapter(implementation, poisoned, device):
    arguments, grad = Problem(4, 5, 3, 2, 24).make(torch.float32, device)
    arguments = *arguments[:10], torch.full((4,), -1, device=device)
    results = all_results(implementation, arguments, grad)
    assert not results["out"][:, :3].any() and not results["grad_prompt"].any() and not results["grad_delta"].any()
    assert_within_rounding(results["out"][:, 3:], lambda: 1.3 * arguments[1][arguments[0]])


@pytest.mark.parametrize("batch, virtual, width", [(0, 3, 8), (2, 0, 8), (2, 3, 0), (0, 0, 0)])
def test_empty(batch, virtual, width, implementation, poisoned, device):
    check_all(implementation, *Problem(batch, 0, virtual, 2, width, more_positions=3).make(torch.float32, device))


@pytest.mark.parametrize("rank", [0, 1, 33, 70])
def test_any_rank(rank, implementation, poisoned, device):
    check_all(implementation, *Problem(3, 9, 2, rank, 40).make(torch.float32, device))


def test_a_gradient_with_strides_of_zero(implementation, poisoned, device):
    arguments, grad = PROBLEMS["padded on the left"].make(torch.float32, device)
    for spread in (
        grad[:1, :1, :1].expand(grad.shape),
        grad[:1, :1].expand(grad.shape),
        grad.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        check_all(implementation, arguments, spread)


def test_memory_that_is_not_aligned(implementation, poisoned, device):
    (input_ids, weight, *rest), grad = Problem(3, 9, 2, 3, 64).make(torch.float16, device)
    weight, grad = (torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (weight, grad))
    check_all(implementation, (input_ids, weight, *rest), grad)


def test_rows_of_the_table_more_than_two_gibi_elements_apart(implementation, device):
    apart = (1 << 31) + 16
    elements = 2 * apart + 24
    if device.type == "cpu":  # untouched pages take no memory
        memory = torch.from_numpy(np.empty(elements, np.float16))
    else:
        memory = torch.empty(elements, dtype=torch.float16, device=device)
    (input_ids, weight, *rest), grad = Problem(2, 6, 2, 3, 24).make(torch.float16, device)
    spread = memory.as_strided((3, 24), (apart, 1)).copy_(weight[:3])
    check_all(implementation, (input_ids % 3, spread, *rest), grad)


def test_through_the_operator(implementation, poisoned, device):
    impl = implementation.__name__.rsplit(".")[-1]
    arguments, grad = PROBLEMS["adapters"].make(torch.float32, device)
    input_ids, weight, prompt, a, b, _, scale, embed_scale, offsets, first, adapter_ids = arguments
    prompt, a, b = (x.clone().requires_grad_() for x in (prompt, a, b))
    options = {
        "scale": scale,
        "embed_scale": embed_scale,
        "offsets": offsets,
        "insert_after_first": first,
        "adapter_ids": adapter_ids,
    }
    out = decomposed_prompt_embedding(input_ids, weight, prompt, a, b, **options, impl=impl)
    out.backward(grad)

    def expected(impl, arguments, grad):
        a, b, found = arguments[3], arguments[4], all_results(impl, arguments, grad)
        return (
            found["out"],
            found["grad_prompt"],
            scale * found["grad_delta"] @ b.mT,
            scale * a.mT @ found["grad_delta"],
        )

    expected_of(expected, reference, arguments, grad).check((out, prompt.grad, a.grad, b.grad))
