"""Tests of both GPU implementations; their test files import this module and define a fixture ``implementation``."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from accuracy import assert_within_rounding
from against_reference import assert_like, expected_of
from special_tokens_on_gpu import DTYPES, random_slots

from peft_kernels.ops.add_layer_norm_inject import add_inject_layer_norm, add_layer_norm_inject, reference


class Problem(NamedTuple):
    batch: int
    length: int
    width: int
    slots: int | None = None  # None: nothing is added
    vectors: int = 2
    adapters: int = 1
    rms: bool = False
    pre: bool = False
    bias: bool = True
    chosen: bool = False  # adapter_ids, -1 among them
    dropout: float = 0.0
    strided: bool = False  # every tensor, including its last dimension
    integer: torch.dtype = torch.int32
    level: float = 0.0  # added to x: the mean is far from 0

    def make(self, dtype, device):
        """The arguments of forward, and grad and grad_sum."""
        every = 2 if self.strided else 1

        def rows(level=0.0):
            x = torch.randn(self.length, self.batch, self.width * every).to(device)[..., ::every] + level
            return x.to(dtype).transpose(0, 1) if self.strided else x.transpose(0, 1).to(dtype).contiguous()

        x, residual, grad, grad_sum = rows(self.level), rows(), rows(), rows()
        weight, bias = torch.randn(self.width).to(device), torch.randn(self.width).to(device) if self.bias else None
        vectors = slots = adapter_ids = seed = None
        if self.slots is not None:
            vectors = torch.randn(self.adapters, self.vectors, self.width).to(device)
            slots = random_slots(self.batch, self.length, self.slots).to(device, self.integer)
            slots = slots.T.contiguous().T if self.strided else slots
        if self.chosen:
            adapter_ids = torch.randint(-1, self.adapters, (self.batch, every), device=device, dtype=self.integer)[:, 0]
        if self.dropout:
            seed = torch.randint(-(2**63), 2**63 - 1, (1,)).to(device)
        arguments = (
            x,
            residual,
            weight,
            bias,
            vectors,
            slots,
            adapter_ids,
            1e-5,
            self.rms,
            self.pre,
            self.dropout,
            seed,
            True,
        )
        return arguments, grad, grad_sum if self.pre else None


PROBLEMS = {
    "no vectors": Problem(3, 5, 128),
    "post": Problem(3, 7, 136, 3),
    "post, rms": Problem(2, 7, 100, 4, rms=True, bias=False, dropout=0.4),
    "pre": Problem(3, 7, 136, 3, pre=True),
    "pre, rms": Problem(2, 7, 24, 4, rms=True, pre=True, bias=False, dropout=0.4),
    "adapters": Problem(6, 9, 40, 4, adapters=3, chosen=True, dropout=0.3),
    "adapters, pre": Problem(6, 9, 40, 4, adapters=3, chosen=True, pre=True, dropout=0.3),
    "strided": Problem(4, 6, 40, 3, adapters=2, chosen=True, strided=True),
    "strided, pre, int64": Problem(4, 6, 41, 3, adapters=2, chosen=True, strided=True, pre=True, integer=torch.int64),
    "many slots": Problem(2, 40, 16, 40, 3, pre=True),
    "width 1": Problem(2, 3, 1, 2, pre=True),
    "a mean far from 0": Problem(3, 5, 200, 2, level=50.0),
    "several warps": Problem(2, 3, 1100, 2, dropout=0.2),
    "several warps, pre": Problem(2, 3, 2048, 2, pre=True, chosen=True),
    "several warps, prime": Problem(1, 3, 4099, 2, pre=True, dropout=0.2),
    "most warps": Problem(1, 2, 8200, 1, rms=True),
}


def all_results(impl, arguments, grad, grad_sum, need_x=True, need_vectors=True):
    _, _, weight, _, vectors, slots, adapter_ids, _, rms, pre, dropout_p, seed, _ = arguments
    out, total, mean, rstd = impl.forward(*arguments)
    sizes = (0, 0) if vectors is None else vectors.shape[:2]
    needs = need_x, need_vectors and vectors is not None
    grads = impl.backward(
        grad, grad_sum, total, mean, rstd, weight, slots, adapter_ids, *sizes, rms, pre, dropout_p, seed, *needs
    )
    return {"out": out, "sum": total, "mean": mean, "rstd": rstd, "grad_x": grads[0], "grad_vectors": grads[1]}


def check_all(implementation, *arguments):
    for name, x in assert_like(reference, implementation, all_results, *arguments).items():
        assert x is None or x.is_contiguous(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_worse_than_torch(problem, dtype, implementation, poisoned, device):
    check_all(implementation, *PROBLEMS[problem].make(dtype, device))


@pytest.mark.parametrize("problem", ["adapters", "adapters, pre"])
def test_repeats_are_bit_equal(problem, implementation, poisoned, device):
    tensors = PROBLEMS[problem].make(torch.float16, device)
    first = all_results(implementation, *tensors)
    for _ in range(9):
        for name, result in all_results(implementation, *tensors).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("problem", ["adapters", "adapters, pre"])
def test_only_what_is_asked_for(problem, needs, implementation, poisoned, device):
    check_all(implementation, *PROBLEMS[problem].make(torch.float32, device), *needs)


@pytest.mark.parametrize("pre", [False, True])
def test_nothing_is_kept_for_inference(pre, implementation, poisoned, device):
    arguments, *_ = Problem(3, 4, 40, 2, pre=pre).make(torch.float16, device)
    _, total, mean, rstd = assert_like(
        reference, implementation, lambda impl, *given: impl.forward(*given), *arguments[:-1], False
    )
    assert (total is not None) == pre and mean is None and rstd is None


def test_the_sum_is_that_of_two_operations(implementation, device):
    arguments, *_ = PROBLEMS["post"].make(torch.float16, device)
    x, residual = arguments[:2]
    assert_within_rounding(implementation.forward(*arguments)[1], lambda: x + residual, x.double() + residual.double())


@pytest.mark.parametrize(
    "batch, length, slots, width, adapters", [(0, 3, 2, 8, 1), (2, 0, 2, 8, 1), (2, 3, 0, 8, 1), (2, 3, 2, 8, 0)]
)
@pytest.mark.parametrize("pre", [False, True])
def test_empty(batch, length, slots, width, adapters, pre, implementation, poisoned, device):
    tensors = Problem(batch, length, width, slots, adapters=adapters, chosen=True, pre=pre).make(torch.float32, device)
    check_all(implementation, *tensors)


@pytest.mark.parametrize("pre", [False, True])
def test_a_gradient_with_strides_of_zero(pre, implementation, poisoned, device):
    arguments, grad, grad_sum = Problem(3, 4, 40, 2, pre=pre).make(torch.float32, device)
    for spread in (grad[:1, :1, :1].expand(grad.shape), grad[:1, :1].expand(grad.shape)):
        check_all(implementation, arguments, spread, grad_sum if grad_sum is None else spread)


@pytest.mark.parametrize("pre", [False, True])
def test_memory_that_is_not_aligned(pre, implementation, poisoned, device):
    (x, residual, *rest), grad, grad_sum = Problem(2, 5, 64, 2, pre=pre, dropout=0.5).make(torch.float16, device)
    x, grad = (torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, grad))
    check_all(implementation, (x, residual, *rest), grad, grad_sum)


def test_rows_more_than_two_gibi_elements_apart(implementation, device):
    apart = (1 << 31) + 16
    if device.type == "cpu":  # untouched pages take no memory
        memory = torch.from_numpy(np.empty(2 * apart + 64, np.float16))
    else:
        memory = torch.empty(2 * apart + 64, dtype=torch.float16, device=device)
    (x, residual, *rest), grad, grad_sum = Problem(3, 2, 24, 2, pre=True).make(torch.float16, device)
    spread = memory.as_strided((3, 2, 24), (apart, 32, 1))
    check_all(implementation, (spread.copy_(x), residual, *rest), grad, grad_sum)
    check_all(implementation, (x, spread.copy_(residual), *rest), grad, grad_sum)
    check_all(implementation, (x, residual, *rest), spread.copy_(grad), grad_sum)
    check_all(implementation, (x, residual, *rest), grad, spread.copy_(grad_sum))


@pytest.mark.parametrize("pre", [False, True])
def test_through_the_operator(pre, implementation, poisoned, device):
    tensors = Problem(6, 9, 40, 4, adapters=3, chosen=True, pre=pre, dropout=0.3).make(torch.float32, device)
    expected = expected_of(all_results, reference, *tensors)
    (x, residual, weight, bias, vectors, slots, adapter_ids, eps, _, _, p, seed, _), grad, grad_sum = tensors
    x, vectors = x.requires_grad_(), vectors.requires_grad_()
    operator = add_inject_layer_norm if pre else add_layer_norm_inject
    options = {
        "eps": eps,
        "dropout_p": p,
        "seed": seed,
        "adapter_ids": adapter_ids,
        "impl": implementation.__name__.rsplit(".")[-1],
    }
    results = operator(x, residual, weight, bias, vectors, slots, **options)
    out, *total = results if pre else (results,)
    torch.autograd.backward((out, *total), (grad, grad_sum) if pre else (grad,))
    expected.check({"out": out, "grad_x": x.grad, "grad_vectors": vectors.grad}, partial=True)
