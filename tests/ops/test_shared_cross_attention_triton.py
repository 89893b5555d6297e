"""The Triton kernels against the reference: in the interpreter without a GPU, on it with ``--device cuda``."""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
from accuracy import WithinRounding
from against_reference import assert_like, expected_of, widened
from shared_cross_attention_cases import by_hand

from peft_kernels.ops import triton_runtime
from peft_kernels.ops.shared_cross_attention import reference, shared_cross_attention
from peft_kernels.ops.shared_cross_attention import triton as implementation

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def runs(device):
    if reason := implementation.unavailable(device.type, torch.float32):
        pytest.skip(reason)


class Problem(NamedTuple):
    streams: tuple[int, ...]  # per input
    tokens: int
    keys: int
    head_dim: int
    heads: int = 2
    lengths: tuple[int, ...] | None = None
    strided: bool = False

    def make(self, dtype, device):
        """query, key, value, grad_out, grad_lse, key_lengths, encoder_index; NaN where keys are padding."""
        inputs, total = len(self.streams), sum(self.streams)

        def random(n, tokens, width):
            if self.strided:  # heads first, as rotary embeddings leave it, every second column
                return torch.randn(n, self.heads, tokens, 2 * width, dtype=torch.float64)[..., ::2].to(device, dtype)
            return torch.randn(n, tokens, self.heads, width, dtype=torch.float64).to(device, dtype).transpose(1, 2)

        query, grad_out = random(total, self.tokens, self.head_dim), random(total, self.tokens, self.head_dim)
        key, value = random(inputs, self.keys, self.head_dim), random(inputs, self.keys, self.head_dim)
        grad_lse = torch.randn(total, self.heads, self.tokens, device=device)
        lengths = index = None
        if self.lengths is not None:
            lengths = torch.tensor(self.lengths, device=device)
            padding = torch.arange(self.keys, device=device) >= lengths[:, None]
            key, value = (x.masked_fill(padding[:, None, :, None], float("nan")) for x in (key, value))
        if len(set(self.streams)) > 1:
            index = torch.arange(inputs, device=device, dtype=torch.int32).repeat_interleave(
                torch.tensor(self.streams, device=device)
            )
        return query, key, value, grad_out, grad_lse, lengths, index


PROBLEMS = {
    "decode": Problem((3, 3), 1, 67, 64),
    "decode, ragged": Problem((2, 0, 19, 1), 1, 70, 16, lengths=(70, 3, 65, 0)),
    "beams of 32": Problem((29,), 1, 131, 128, heads=1),
    "tiles": Problem((5, 5), 13, 97, 24, heads=1, lengths=(97, 31)),
    "tiles, ragged": Problem((0, 7, 1, 0, 11), 13, 71, 80, heads=1, lengths=(5, 71, 0, 9, 64)),
    "strided": Problem((2, 4), 17, 37, 24, lengths=(37, 1), strided=True),
    "wide heads": Problem((3, 1), 7, 37, 256, heads=1, lengths=(35, 37)),
    "one of everything": Problem((1,), 1, 1, 1, heads=1),
}


NAMES = "out", "lse", "grad_query", "grad_key", "grad_value"


def all_results(impl, tensors, scale, with_grad_lse=True, needs=(True, True, True)):
    query, key, value, grad_out, grad_lse, lengths, index = tensors
    out, lse = impl.forward(query, key, value, lengths, index, scale)
    grads = impl.backward(
        grad_out, grad_lse if with_grad_lse else None, query, key, value, out, lse, lengths, index, scale, *needs
    )
    return dict(zip(NAMES, (out, lse, *grads)))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_worse_than_torch(problem, dtype, splits, device, monkeypatch):
    monkeypatch.setattr(implementation, "num_splits", lambda programs, n, processors: splits)
    tensors = PROBLEMS[problem].make(dtype, device)
    scale = PROBLEMS[problem].head_dim ** -0.5
    for name, result in assert_like(reference, implementation, all_results, tensors, scale, splits == 1).items():
        assert result.transpose(1, 2).is_contiguous(), name


def test_padding_and_inputs_without_streams_have_gradient_zero(device):
    tensors = Problem((2, 0, 1), 5, 40, 16, lengths=(33, 40, 0)).make(torch.float32, device)
    results = all_results(implementation, tensors, 0.25)
    for grad in (results["grad_key"], results["grad_value"]):
        assert not grad[0, :, 33:].any() and not grad[1:].any()
    assert (
        not results["out"][2].any() and results["lse"][2].eq(float("-inf")).all() and not results["grad_query"][2].any()
    )


@pytest.mark.parametrize("needs", [(q, k, v) for q in (False, True) for k in (False, True) for v in (False, True)])
@pytest.mark.parametrize("apart", [False, True])
def test_only_what_is_asked_for(needs, apart, device, monkeypatch):
    configs_of = implementation.configs_of
    monkeypatch.setattr(implementation, "configs_of", lambda *a: configs_of(*a)._replace(apart=apart))
    tensors = Problem((2, 1), 3, 19, 16, lengths=(17, 19)).make(torch.float32, device)
    results = assert_like(reference, implementation, all_results, tensors, 0.3, True, needs)
    assert [results[name] is not None for name in NAMES[2:]] == list(needs)


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.7])
def test_any_scale(scale, device):
    tensors = Problem((3, 2), 1, 21, 16, lengths=(21, 4)).make(torch.float32, device)
    assert_like(reference, implementation, all_results, tensors, scale)


def test_large_scores(device):
    """A weight recomputed from its score and the log-sum-exp has the rounding of both, and terms that would cancel do
    so no longer.
    """
    query, key, value, *rest = Problem((3, 2), 1, 21, 16, lengths=(21, 4)).make(torch.float32, device)
    tensors = 100 * query, 100 * key, value, *rest  # most weights underflow

    def plain(tensors):
        *leaves, grad_out, grad_lse, lengths, index = tensors
        leaves = [x.detach().requires_grad_() for x in leaves]
        results = by_hand(*leaves, key_lengths=lengths, encoder_index=index, scale=1.0)
        grads = torch.autograd.grad(results, leaves, (grad_out, grad_lse.to(grad_out.dtype)))
        return dict(zip(NAMES, (*(x.detach() for x in results), *grads)))

    WithinRounding(lambda: plain(tensors), plain(widened(tensors))).check(all_results(implementation, tensors, 1.0))


@pytest.mark.parametrize("splits", [1, 4])
def test_repeats_are_bit_equal(splits, device, monkeypatch):
    monkeypatch.setattr(implementation, "num_splits", lambda programs, n, processors: splits)
    tensors = Problem((3, 0, 9), 1, 67, 16, lengths=(64, 1, 67)).make(torch.float16, device)
    first = all_results(implementation, tensors, 0.25)
    for _ in range(9):
        for name, result in all_results(implementation, tensors, 0.25).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.parametrize(
    "streams, tokens, keys", [((0, 0), 3, 5), ((2, 2), 0, 5), ((2, 2), 3, 0), ((), 3, 5), ((1, 3), 2, 0)]
)
def test_empty(streams, tokens, keys, device):
    tensors = Problem(streams, tokens, keys, 16).make(torch.float32, device)
    assert_like(reference, implementation, all_results, tensors, 1.0)


def test_lengths_and_index_of_either_width(device):
    *tensors, lengths, index = Problem((3, 1), 2, 21, 16, lengths=(21, 4)).make(torch.float32, device)
    for dtype in (torch.int64, torch.int32):
        assert_like(reference, implementation, all_results, (*tensors, lengths.to(dtype), index.to(dtype)), 1.0)


def test_strides_of_zero(device):
    query, key, value, grad_out, _, lengths, index = Problem((3, 2), 2, 21, 16).make(torch.float32, device)
    spread = [x[:1, :, :1].expand(x.shape) for x in (query, key, value)] + [
        grad_out[:1, :1, :1, :1].expand(grad_out.shape)
    ]
    assert_like(reference, implementation, all_results, (*spread, None, lengths, index), 1.0)


def test_through_the_operator(device):
    tensors = Problem((3, 2), 2, 21, 16, lengths=(21, 4)).make(torch.float32, device)
    expected = expected_of(all_results, reference, tensors, 0.25, False)
    query, key, value, grad_out, *_, lengths, index = tensors
    query.requires_grad_()
    value.requires_grad_()
    out = shared_cross_attention(query, key, value, key_lengths=lengths, encoder_index=index, impl="triton")
    out.backward(grad_out)
    expected.check({"out": out, "grad_query": query.grad, "grad_value": value.grad}, partial=True)
    assert key.grad is None


@pytest.mark.parametrize("rows", [(7,), (0, 5, 0, 1), (40, 0, 0, 129, 16, 1, 15), (1,) * 50])
@pytest.mark.parametrize("block", [16, 64])
def test_the_grid_of_ragged_streams_covers_every_row(rows, block):
    """The layout that tile_of_rows bisects: programs from first_row // block + input on belong to that input."""
    first = [sum(rows[:i]) for i in range(len(rows) + 1)]
    starts = [first[i] // block + i for i in range(len(rows))] + [first[-1] // block + len(rows)]
    assert starts[-1] == implementation._tiles(block, first[-1], len(rows), torch.empty(0))
    assert all((starts[i + 1] - starts[i]) * block >= rows[i] for i in range(len(rows)))


def test_splits_fill_the_device_and_stay_long_enough():
    assert implementation.num_splits(1000, 1 << 20, 132) == 1
    assert implementation.num_splits(106, 4096, 132) == 1  # 80 % of the SMs are busy
    assert implementation.num_splits(12, 512, 132) == 7  # 84 programs of 73 keys and more
    assert implementation.num_splits(48, 4096, 132) == 5  # 240 programs in two waves; 96, in one, fill 73 %
    assert implementation.num_splits(12, 127, 132) == 1
    assert implementation.num_splits(1, 1 << 20, 132) == 55


@pytest.mark.parametrize(
    "device_type, dtype, reason", [("cuda", torch.float64, "float64"), ("mps", torch.float32, "not mps")]
)
def test_says_why_it_cannot_run(device_type, dtype, reason):
    assert reason in implementation.unavailable(device_type, dtype)


def test_refuses_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    assert "TRITON_INTERPRET" in implementation.unavailable("cpu", torch.float32)
    monkeypatch.setattr(triton_runtime, "INSTALLED", False)
    assert implementation.unavailable("cuda", torch.float32) == "triton is not installed"
