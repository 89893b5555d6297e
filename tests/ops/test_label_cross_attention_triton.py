"""The Triton kernels against library matmuls: in the interpreter without a GPU, on it with ``--device cuda``."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from accuracy import WithinRounding
from against_reference import assert_like, expected_of
from label_cross_attention_cases import by_hand
from special_tokens_on_gpu import DTYPES

from peft_kernels.ops import label_cross_attention
from peft_kernels.ops.label_cross_attention import matmul, triton


@pytest.fixture(autouse=True)
def runs(device):
    if reason := triton.unavailable(device.type, torch.float32):
        pytest.skip(reason)


class Problem(NamedTuple):
    lengths: tuple[int, ...]  # one per row
    tokens: int = 0  # per row, padding included; 0: no padding, offsets
    slots: int = 3
    heads: int = 2
    width: int = 24
    strided: bool = False
    integer: torch.dtype = torch.int64

    def make(self, dtype, device, shared=True, wide=None):
        """queries, features, lengths, offsets; and the gradient of the pooled output. NaN in the padding."""
        batch = len(self.lengths)

        def random(*shape):
            return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

        rows = [random(length, self.width) for length in self.lengths]
        lengths = offsets = None
        if self.tokens:
            features = torch.full((batch, self.tokens, self.width), torch.nan, dtype=dtype, device=device)
            for row, given in zip(features, rows):
                row[: len(given)] = given
            lengths = (
                torch.tensor(self.lengths, dtype=self.integer, device=device)
                if min(self.lengths) < self.tokens
                else None
            )
        else:
            features = torch.cat(rows)
            offsets = torch.tensor([0, *np.cumsum(self.lengths)], dtype=self.integer, device=device)
        if self.strided:  # other columns lie between the tokens
            features = torch.cat((features, torch.full_like(features, torch.nan)), -1)[..., : self.width]
            lengths, offsets = (x if x is None else torch.stack((x, x), 1)[:, 0] for x in (lengths, offsets))
        queries = random(self.heads, 1 if shared else batch, self.slots, self.width)
        grad = random(self.heads, batch, self.slots, self.width)
        return [x.to(wide or dtype) for x in (queries, grad)], features, lengths, offsets


PROBLEMS = {
    "full": Problem((37, 37), 37),
    "padded": Problem((70, 0, 1, 37), 70, strided=True),
    "ragged": Problem((5, 0, 140, 1), integer=torch.int32),
    "ragged, strided": Problem((17, 40), strided=True),
    "odd width": Problem((9, 21), 21, width=37, heads=1),
    "one of everything": Problem((1,), 1, slots=1, heads=1, width=1),
    "columns of several tiles": Problem((11,), 11, width=131),
    "queries of several blocks": Problem((9, 3), 9, slots=23, heads=6),
    "parts of the batch": Problem((20,) * 5, 20, width=8),
}


def all_results(impl, problem, shared):
    (queries, grad), features, lengths, offsets = problem
    scale = queries.shape[3] ** -0.5
    pooled, weights = impl.pool(queries, features, lengths, offsets, scale, True)
    return pooled, weights, impl.pool_backward(grad, features, weights, lengths, offsets, scale, shared)


def pool(impl, *arguments):
    return impl.pool(*arguments)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_worse_than_torch(problem, dtype, shared, device):
    dtype, wide = (torch.float16, torch.float32) if dtype == "mixed" else (dtype, None)
    given = PROBLEMS[problem].make(dtype, device, shared, wide)
    for name, x in zip(("pooled", "weights", "grad"), assert_like(matmul, triton, all_results, given, shared)):
        assert x.is_contiguous(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blackwell_multiplies_the_same(dtype, device, monkeypatch):
    """On Blackwell the kernels hide the feature width from the compiler."""
    given = PROBLEMS["padded"].make(dtype, device, True, torch.float32)
    monkeypatch.setattr(triton, "on_blackwell", lambda device: True)
    assert_like(matmul, triton, all_results, given, True)


def test_without_weights(device):
    (queries, _), *rest = PROBLEMS["ragged"].make(torch.float32, device)
    assert_like(matmul, triton, pool, queries, *rest, 0.2, False)
    assert triton.pool(queries, *rest, 0.2, False)[1] is None


@pytest.mark.parametrize("scale", [0.0, -0.7, 100.0])
def test_any_scale(scale, device):
    (queries, _), *rest = PROBLEMS["padded"].make(torch.float32, device)
    assert_like(matmul, triton, pool, queries, *rest, scale, True)


def test_a_row_does_not_depend_on_the_others(device):
    """A row does not depend on where its tokens begin either."""
    (queries, grad), features, _, offsets = PROBLEMS["ragged"].make(torch.float32, device, shared=False)
    expected = expected_of(all_results, matmul, ((queries, grad), features, None, offsets), False)
    alone = []
    for b, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        row = (
            (queries[:, b : b + 1].contiguous(), grad[:, b : b + 1].contiguous()),
            features[None, begin:end],
            None,
            None,
        )
        alone.append(all_results(triton, row, False))
    pooled, weights, grads = zip(*alone)
    expected.check((torch.cat(pooled, 1), torch.cat(weights, 1)[0], torch.cat(grads, 1)))


@pytest.mark.parametrize("problem", [Problem((5, 0, 70)), Problem((9, 20), 20)])
def test_ten_repeats_are_bit_equal(problem, device):
    given = problem.make(torch.float16, device)
    first, *rest = (all_results(triton, given, True) for _ in range(10))
    assert all(torch.equal(x, y) for again in rest for x, y in zip(first, again))


@pytest.mark.parametrize(
    "problem", [Problem((0, 0), 4), Problem((0, 0)), Problem((), 4), Problem(()), Problem((2,), 2, slots=0)]
)
@pytest.mark.parametrize("shared", [True, False])
def test_empty(problem, shared, device):
    if not problem.lengths:
        features = torch.zeros(0, 4, 24, device=device) if problem.tokens else torch.zeros(0, 24, device=device)
        grad = torch.zeros(2, 0, 3, 24, device=device)
        given = (
            (torch.randn(2, 1, 3, 24, device=device), grad),
            features,
            None,
            None if problem.tokens else torch.tensor([0], device=device),
        )
    else:
        given = problem.make(torch.float32, device, shared)
    assert_like(matmul, triton, all_results, given, shared)


def test_rows_more_than_two_gibi_elements_apart(device):
    apart = (1 << 31) + 16
    if device.type == "cpu":  # untouched pages take no memory
        memory = torch.from_numpy(np.empty(2 * apart + 64, np.float16))
    else:
        memory = torch.empty(2 * apart + 64, dtype=torch.float16, device=device)
    (queries, grad), features, *_ = Problem((1, 1, 1), 1).make(torch.float16, device)
    for given in (
        (features, None, None),
        (features[:, 0], None, torch.arange(4, device=device)),
        (features.transpose(0, 1), None, None),
    ):
        dense = given[0].contiguous()
        batch = len(dense) if given[2] is None else 3
        strides = (
            (24, apart, 1) if len(dense) == 1 and dense.ndim == 3 else (apart, 24, 1) if dense.ndim == 3 else (apart, 1)
        )
        spread = memory.as_strided(dense.shape, strides).copy_(dense)
        expected = expected_of(all_results, matmul, ((queries, grad[:, :batch].contiguous()), dense, *given[1:]), True)
        expected.check(all_results(triton, ((queries, grad[:, :batch].contiguous()), spread, *given[1:]), True))


@pytest.mark.parametrize("per_row", [True, False])
def test_through_the_operator(per_row, device):
    _, features, lengths, _ = PROBLEMS["padded"].make(torch.float32, device)
    grad = torch.randn(4, 3, 24, device=device)
    leaves = [
        torch.randn(*shape, device=device) / 5 for shape in ((4, 3, 24)[not per_row :], (24, 24), (24, 24), (24, 24))
    ]

    def of_triton(slots, w_q, w_k, w_v, features, **options):
        return label_cross_attention(slots, features, w_q, w_k, w_v, **options, impl="triton")

    def results(function, dtype):
        given = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
        out = function(*given, features.to(dtype), lengths=lengths, num_heads=2)
        return out.detach(), *torch.autograd.grad(out, given, grad.to(dtype))

    expected = WithinRounding(lambda: results(by_hand, torch.float32), results(by_hand, torch.float64))
    expected.check(results(of_triton, torch.float32))


@pytest.mark.parametrize(
    "unit, queries, block", [("half", 1, 16), ("half", 36, 64), ("half", 129, 128), ("fma", 65, 64), ("amd", 17, 32)]
)
def test_the_least_block_that_holds_all_queries(unit, queries, block):
    assert triton.scores_options(unit, queries)["BQ"] == triton.pool_options(unit, queries)["BQ"] == block


@pytest.mark.parametrize(
    "device_type, dtype, reason", [("cuda", torch.float64, "float64"), ("mps", torch.float32, "not mps")]
)
def test_says_why_it_cannot_run(device_type, dtype, reason):
    assert reason in triton.unavailable(device_type, dtype)
