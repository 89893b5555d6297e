"""Tests of both GPU implementations; their test files import this module and define a fixture ``implementation``."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from accuracy import WithinRounding
from against_reference import assert_like, expected_of

from peft_kernels.ops.special_tokens import reference, special_token_add, special_token_add_, special_token_slots
from peft_kernels.ops.vector_dropout import factors

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Problem(NamedTuple):
    batch: int
    length: int
    slots: int
    vectors: int
    width: int
    adapters: int = 1
    chosen: bool = False  # adapter_ids, -1 among them
    dropout: float = 0.0
    strided: bool = False  # every tensor, including its last dimension
    integer: torch.dtype = torch.int32

    def make(self, dtype, device):
        """hidden, vectors, slots, dropout_p, seed, adapter_ids; and grad."""
        every = 2 if self.strided else 1

        def random(*shape):
            return torch.randn(*shape[:-1], shape[-1] * every).to(device)[..., ::every]

        hidden, grad = (random(self.batch, self.length, self.width).to(dtype) for _ in range(2))
        if self.strided:
            hidden, grad = (x.mT.contiguous().mT for x in (hidden, grad))
        adapter_ids = (
            torch.randint(-1, self.adapters, (self.batch, every), device=device, dtype=self.integer)[:, 0]
            if self.chosen
            else None
        )
        slots = random_slots(self.batch, self.length, self.slots).to(device, self.integer)
        slots = slots.T.contiguous().T if self.strided else slots
        seed = torch.randint(-(2**63), 2**63 - 1, (1,)).to(device) if self.dropout else None
        return (hidden, random(self.adapters, self.vectors, self.width), slots, self.dropout, seed, adapter_ids), grad


def random_slots(batch, length, count):
    """Distinct positions in random order, with -1 anywhere."""
    positions = torch.rand(batch, max(length, count)).argsort(1)[:, :count]
    return positions.masked_fill((positions >= length) | (torch.rand(batch, count) < 0.3), -1)


PROBLEMS = {
    "plain": Problem(3, 17, 3, 3, 128),
    "more slots than vectors": Problem(4, 11, 9, 2, 40, dropout=0.25),
    "more vectors than slots": Problem(2, 9, 2, 4, 24),
    "adapters": Problem(7, 13, 4, 3, 136, adapters=3, chosen=True, dropout=0.6),
    "one adapter or none, int64": Problem(5, 8, 3, 2, 48, chosen=True, integer=torch.int64),
    "strided": Problem(4, 11, 5, 3, 40, adapters=2, chosen=True, strided=True, dropout=0.1),
    "strided, int64": Problem(4, 11, 5, 3, 41, adapters=2, chosen=True, strided=True, integer=torch.int64),
    "width 1": Problem(3, 5, 4, 2, 1, dropout=0.5),
    "several tiles": Problem(2, 4, 3, 2, 2100, dropout=0.9),
    "several parts": Problem(70, 3, 3, 2, 8, adapters=2, chosen=True),
}


def all_results(impl, arguments, grad):
    hidden, vectors, *rest = arguments
    out = torch.empty_strided(hidden.shape, hidden.stride(), dtype=hidden.dtype, device=hidden.device).copy_(hidden)
    impl.add_(out, vectors, *rest)
    slots, *rest = rest
    return {"out": out, "grad_vectors": impl.backward(grad, slots, *vectors.shape[:2], *rest)}


def check_all(implementation, arguments, grad):
    assert_like(reference, implementation, all_results, arguments, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_worse_than_torch(problem, dtype, implementation, poisoned, device):
    check_all(implementation, *PROBLEMS[problem].make(dtype, device))


def test_touches_the_listed_rows_alone(implementation, poisoned, device):
    (hidden, vectors, slots, *rest), _ = PROBLEMS["adapters"].make(torch.float16, device)
    adapter_ids = rest[-1]
    out = hidden.clone()
    implementation.add_(out, vectors, slots, *rest)
    listed = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=device)
    for row in range(len(slots)):
        listed[row, slots[row][(slots[row] >= 0) & (adapter_ids[row] >= 0)].long()] = True
    assert torch.equal(out[~listed], hidden[~listed]) and (out != hidden).any(-1)[listed].all()


@pytest.mark.parametrize("p", [1e-9, 0.37, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**62 + 12345])
def test_drops_what_the_reference_drops(p, seed, implementation, device):
    batch, count, width = 3, 4, 50
    hidden, vectors = torch.zeros(batch, count, width, device=device), torch.ones(1, 2, width, device=device)
    slots, seed = torch.arange(count, device=device).repeat(batch, 1), torch.tensor([seed], device=device)
    expected = factors(p, seed, batch, count, width)
    implementation.add_(hidden, vectors, slots, p, seed, None)
    assert torch.equal(hidden != 0, expected != 0)
    scaled = WithinRounding(lambda: (expected != 0) / torch.full_like(expected, 1 - p))
    scaled.check(hidden)
    one_row = torch.eye(batch, device=device)[:, :, None, None].expand(batch, batch, count, width)
    scaled.check(
        torch.cat([implementation.backward(grad.contiguous(), slots, 1, count, p, seed, None) for grad in one_row])
    )


def test_repeats_are_bit_equal(implementation, poisoned, device):
    arguments, grad = PROBLEMS["more slots than vectors"].make(torch.float16, device)
    first = all_results(implementation, arguments, grad)
    for _ in range(9):
        for name, result in all_results(implementation, arguments, grad).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.parametrize(
    "batch, length, slots, width, adapters",
    [(0, 3, 2, 8, 1), (2, 0, 2, 8, 1), (2, 3, 0, 8, 2), (2, 3, 2, 0, 1), (2, 3, 2, 8, 0)],
)
def test_empty(batch, length, slots, width, adapters, implementation, poisoned, device):
    arguments, grad = Problem(batch, length, slots, 2, width, adapters=adapters, chosen=True).make(
        torch.float32, device
    )
    check_all(implementation, arguments, grad)


def test_a_gradient_with_strides_of_zero(implementation, poisoned, device):
    arguments, grad = PROBLEMS["plain"].make(torch.float32, device)
    for spread in (
        grad[:1, :1, :1].expand(grad.shape),
        grad[:1, :1].expand(grad.shape),
        grad.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        check_all(implementation, arguments, spread)


def test_memory_that_is_not_aligned(implementation, poisoned, device):
    (hidden, vectors, *rest), grad = Problem(3, 9, 2, 3, 64, dropout=0.5).make(torch.float16, device)
    hidden, grad = (torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (hidden, grad))
    check_all(implementation, (hidden, vectors, *rest), grad)
    expected = expected_of(all_results, reference, (hidden, vectors, *rest), grad)
    implementation.add_(hidden, vectors, *rest)
    expected.check({"out": hidden}, partial=True)


def test_rows_more_than_two_gibi_elements_apart(implementation, device):
    apart = (1 << 31) + 16
    if device.type == "cpu":  # untouched pages take no memory
        memory = torch.from_numpy(np.empty(2 * apart + 64, np.float16))
    else:
        memory = torch.empty(2 * apart + 64, dtype=torch.float16, device=device)
    (hidden, vectors, slots, *rest), grad = Problem(3, 2, 2, 1, 24).make(torch.float16, device)
    spread = memory.as_strided((3, 2, 24), (apart, 32, 1)).copy_(hidden)
    slots = torch.tensor([[0, 1]] * 3, device=device)
    implementation.add_(spread, vectors, slots, *rest)
    grad = spread.clone()
    expected = expected_of(all_results, reference, (hidden, vectors, slots, *rest), grad)
    expected.check({"out": spread, "grad_vectors": implementation.backward(spread, slots, 1, 1, *rest)})


@pytest.mark.parametrize("max_slots", [0, 2, 7, 600])
@pytest.mark.parametrize("length", [1, 31, 64, 1500])
def test_slots(length, max_slots, implementation, poisoned, device):
    input_ids, special_ids = (
        torch.randint(0, 60, (5, length), device=device),
        torch.tensor([3, 50, 3, 17], device=device),
    )
    input_ids[0] = 3
    input_ids[1] = 0
    for mask in (None, torch.rand(5, length, device=device) < 0.8):
        check_slots(implementation, input_ids, special_ids, mask, max_slots)


def check_slots(implementation, input_ids, special_ids, mask, max_slots):
    arguments = input_ids, special_ids, mask, max_slots
    (slots, counts), (expected_slots, expected_counts) = implementation.slots(*arguments), reference.slots(*arguments)
    assert (
        slots.dtype == torch.int32
        and torch.equal(slots, expected_slots)
        and torch.equal(counts.long(), expected_counts)
    )


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32, torch.float16, torch.float64],
)
def test_slots_of_strided_tensors(dtype, implementation, poisoned, device):
    mask = torch.tensor([0.0, 1.0, 2.0, -0.0], device=device)[torch.randint(0, 4, (70, 3), device=device)].to(dtype).T
    for ids_dtype, special_dtype in ((torch.int64, torch.int32), (torch.int32, torch.int64)):
        input_ids = torch.randint(0, 5, (70, 6), device=device, dtype=ids_dtype).T[::2]
        special_ids = torch.tensor([1, 9, 4, 9], device=device, dtype=special_dtype)[::2]
        check_slots(implementation, input_ids, special_ids, mask, 20)


@pytest.mark.parametrize("batch, length, specials", [(0, 3, 1), (2, 0, 1), (2, 3, 0)])
def test_slots_of_nothing(batch, length, specials, implementation, poisoned, device):
    input_ids, special_ids = torch.ones(batch, length, device=device).long(), torch.ones(specials, device=device).long()
    check_slots(implementation, input_ids, special_ids, None, 4)


def test_through_the_operator(implementation, poisoned, device):
    impl = implementation.__name__.rsplit(".")[-1]
    (hidden, vectors, slots, p, seed, adapter_ids), grad = PROBLEMS["adapters"].make(torch.float32, device)
    expected = expected_of(all_results, reference, (hidden, vectors, slots, p, seed, adapter_ids), grad)
    options = {"dropout_p": p, "seed": seed, "adapter_ids": adapter_ids, "impl": impl}
    vectors.requires_grad_()
    out = special_token_add(hidden, vectors, slots, **options)
    out.backward(grad)
    expected.check({"out": out, "grad_vectors": vectors.grad})
    with torch.no_grad():
        expected.check({"out": special_token_add_(hidden, vectors, slots, **options)}, partial=True)
    found = special_token_slots(torch.tensor([[5, 1, 5], [0, 5, 5]], device=device), [5], max_slots=3, impl=impl)
    assert found.tolist() == [[0, 2, -1], [1, 2, -1]]
