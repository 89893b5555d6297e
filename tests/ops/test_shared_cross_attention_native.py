"""The C++ implementation against float64, with this CPU's kernels and with those of the lower instruction sets that it
can run.
"""

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from operator_cases import assert_refused
from shared_cross_attention_cases import by_hand

from peft_kernels.ops.shared_cross_attention import cpp, reference, shared_cross_attention

if cpp.unavailable("cpu", torch.float32):
    pytest.skip(cpp.unavailable("cpu", torch.float32), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16)

# streams per input, heads, tokens, keys, D
SHAPES = {
    "decode": ([30], 12, 1, 512, 64),
    "long": ([8], 3, 1, 2048, 64),
    "prime": ([7, 7], 3, 5, 131, 64),
    "every D: 1": ([3, 3], 2, 3, 37, 1),
    "every D: 16": ([5, 5], 2, 3, 101, 16),
    "every D: 24": ([5, 5], 3, 3, 97, 24),
    "every D: 33": ([5], 2, 7, 97, 33),
    "every D: 80": ([9, 9], 2, 2, 113, 80),
    "every D: 128": ([11], 2, 2, 200, 128),
    "every D: 256": ([3, 3], 2, 5, 73, 256),
    "one key": ([2, 2], 2, 3, 1, 64),
    "more rows than one task takes": ([67], 2, 9, 150, 64),
    "streams differ": ([4, 0, 1, 17, 0], 2, 3, 61, 64),
    "splits": ([2], 1, 1, 1500, 64),
}


def make(streams, heads, tokens, keys, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator).to(dtype).transpose(1, 2)  # noqa: E731
    query = 2 * randn(sum(streams), tokens, heads, width)
    key, value = randn(len(streams), keys, heads, width), randn(len(streams), keys, heads, width)
    index = None if len(set(streams)) <= 1 else torch.arange(len(streams)).repeat_interleave(torch.tensor(streams))
    return query, key, value, index


def check(query, key, value, lengths, index, scale):
    arguments = lengths, index, scale, True
    out, lse = shared_cross_attention(
        query, key, value, key_lengths=lengths, encoder_index=index, scale=scale, return_lse=True, impl="cpp"
    )
    truth = reference.forward(query.double(), key.double(), value.double(), *arguments)
    assert out.dtype == query.dtype and out.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    assert_within_rounding((out, lse), lambda: reference.forward(query, key, value, *arguments), truth)


def with_lengths(key, value):
    """Full, empty and intermediate lengths, with NaN beyond them."""
    inputs, keys = key.shape[0], key.shape[2]
    lengths = torch.randint(0, keys + 1, (inputs,), dtype=torch.int32)
    lengths[0] = keys
    lengths[-1] = 0 if inputs > 1 else keys - 1
    hidden = torch.arange(keys) >= lengths[:, None]
    return lengths, *(x.masked_fill(hidden[:, None, :, None], float("nan")) for x in (key, value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_forward(shape, dtype, ragged):
    query, key, value, index = make(*shape, dtype)
    lengths, key, value = with_lengths(key, value) if ragged else (None, key, value)
    check(query, key, value, lengths, index, shape[4] ** -0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_scale(dtype, scale):
    query, key, value, index = make([5, 5], 2, 3, 83, 64, dtype)
    check(query, key, value, None, index, scale)


CHANGES = (  # changes of the strides alone
    lambda x: x.repeat_interleave(2, -1)[..., ::2],  # D stride 2
    lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1],  # rows an odd number of elements apart
    torch.Tensor.contiguous,
    lambda x: x.mT.contiguous().mT,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    query, key, value, index = make([4, 4], 3, 5, 90, 32, dtype)
    for change in CHANGES:
        check(change(query), key, value, None, index, 0.2)
        check(query, change(key), value, None, index, 0.2)
        check(query, key, change(value), None, index, 0.2)
    check(
        query[:1].expand(8, -1, -1, -1),
        key[:1].expand(2, -1, -1, -1),
        value[:, :, :1].expand(-1, -1, 90, -1),
        None,
        index,
        0.2,
    )
    check(
        query,
        key[:, :, ::3],
        value[:, :, ::3],
        torch.tensor([30, 7])[:, None].expand(-1, 2)[:, 0],
        torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]),
        0.2,
    )


def test_large_scores():
    query, key, value, index = make([3], 2, 2, 300, 64, torch.float32)
    check(query * 20, key * 20, value, None, index, 1.0)  # most weights underflow


def test_nan_reaches_only_its_row():
    query, key, value, _ = make([6], 2, 1, 50, 16, torch.float32)
    query[2] = float("nan")
    out = shared_cross_attention(query, key, value, impl="cpp")
    assert out[2].isnan().all() and not out[[0, 1, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_repeats_are_bit_equal(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        query, key, value, _ = make([13], 3, 2, 700, 64, dtype)
        check(query, key, value, None, None, 0.1)
        first, *rest = (shared_cross_attention(query, key, value, return_lse=True, impl="cpp") for _ in range(10))
        assert all(torch.equal(a, b) for again in rest for a, b in zip(first, again))
    finally:
        torch.set_num_threads(before)


EMPTY = [([], 2, 3, 5, 8), ([0, 0], 2, 3, 5, 8), ([2, 2], 0, 3, 5, 8), ([2, 2], 2, 0, 5, 8), ([2, 2], 2, 3, 0, 8)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(shape, dtype):
    query, key, value, index = make(*shape, dtype)
    out, lse = shared_cross_attention(query, key, value, encoder_index=index, return_lse=True, impl="cpp")
    assert out.shape == query.shape and (out == 0).all() and (lse == float("-inf")).all()


def gradients(impl, query, key, value, lengths, index, scale, dtype):
    """The gradients of a weighted sum of the output and of the finite log-sum-exps."""
    generator = torch.Generator().manual_seed(1)
    inputs = [x.to(dtype).detach().requires_grad_() for x in (query, key, value)]
    out, lse = shared_cross_attention(
        *inputs, key_lengths=lengths, encoder_index=index, scale=scale, return_lse=True, impl=impl
    )
    probe, lse_probe = (torch.randn(x.shape, generator=generator).to(query.dtype) for x in (out, lse))
    loss = (out * probe.to(out)).sum() + (lse.masked_fill(lse.isinf(), 0) * lse_probe).sum()
    return torch.autograd.grad(loss, inputs)


def check_backward(query, key, value, lengths, index, scale):
    arguments = query, key, value, lengths, index, scale
    truth = gradients("reference", *arguments, torch.float64)
    assert_within_rounding(
        gradients("cpp", *arguments, query.dtype), lambda: gradients("reference", *arguments, query.dtype), truth
    )


BACKWARD_SHAPES = {
    **SHAPES,
    "rows in chunks": ([90, 20], 2, 5, 131, 40),
    "rows in chunks, streams differ": ([40, 0, 41], 1, 13, 100, 64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BACKWARD_SHAPES.values(), ids=BACKWARD_SHAPES)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_backward(shape, dtype, ragged):
    query, key, value, index = make(*shape, dtype)
    lengths, key, value = with_lengths(key, value) if ragged else (None, key, value)
    check_backward(query, key, value, lengths, index, shape[4] ** -0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_strides(dtype):
    query, key, value, index = make([4, 4], 3, 5, 90, 32, dtype)
    grad = torch.randn(query.shape).to(dtype)

    def plain(*tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, _ = by_hand(*leaves, encoder_index=index)
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))

    expected = WithinRounding(lambda: plain(query, key, value), plain(*(x.double() for x in (query, key, value))))
    for change in CHANGES:
        check_backward(change(query), change(key), change(value), None, index, 0.2)
        inputs = [change(x).requires_grad_() for x in (query, key, value)]
        out = shared_cross_attention(*inputs, encoder_index=index, impl="cpp")
        expected.check(torch.autograd.grad(out, inputs, change(grad)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("streams", ([5, 2], [60, 61]), ids=str)
def test_backward_of_some_inputs_is_that_of_all(streams, dtype):
    query, key, value, index = make(streams, 2, 5, 130, 32, dtype)
    arguments = query, key, value, None, index, 0.2
    every = WithinRounding(
        lambda: gradients("reference", *arguments, dtype), gradients("reference", *arguments, torch.float64)
    )
    for needs in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)):
        inputs = [x.detach().requires_grad_(bool(needed)) for x, needed in zip((query, key, value), needs)]
        out, lse = shared_cross_attention(*inputs, encoder_index=index, scale=0.2, return_lse=True, impl="cpp")
        generator = torch.Generator().manual_seed(1)
        probe, lse_probe = (torch.randn(x.shape, generator=generator).to(dtype) for x in (out, lse))
        ((out * probe).sum() + (lse * lse_probe).sum()).backward()
        assert [x.grad is not None for x in inputs] == [bool(needed) for needed in needs]
        every.check(tuple(x.grad for x in inputs), partial=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_backward_repeats_are_bit_equal(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        query, key, value, _ = make([13, 13], 3, 2, 300, 64, dtype)
        first, *rest = (
            gradients("cpp", query, key, value, torch.tensor([300, 170]), None, 0.1, dtype) for _ in range(10)
        )
        assert all(torch.equal(a, b) for again in rest for a, b in zip(first, again))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_empty(shape, dtype):
    query, key, value, index = make(*shape, dtype)
    for x, gradient in zip((query, key, value), gradients("cpp", query, key, value, None, index, 0.1, dtype)):
        assert gradient.shape == x.shape and (gradient == 0).all()


def test_refusals():
    query, key, value, _ = make([2], 1, 1, 4, 8, torch.float16)
    with pytest.raises(
        ValueError,
        match="impl='cpp' cannot run here: its kernels take torch.float32 and torch.bfloat16, not torch.float16",
    ):
        shared_cross_attention(query, key, value, impl="cpp")
    operator = torch.ops.peft_kernels.shared_cross_attention_cpu
    query, key, value = (x.float() for x in (query, key, value))
    assert_refused(
        operator,
        (query, key, value, None, None, 1.0),
        ({0: query.double()}, "query must be float32 or bfloat16"),
        ({1: key.double()}, "one dtype"),
        ({1: key[..., :4]}, "heads and D"),
        ({3: torch.tensor([5])}, r"key_lengths must lie in \[0, 4\]"),
        ({4: torch.tensor([0, 1])}, "encoder_index"),
        ({4: torch.tensor([0.0, 0.0])}, "encoder_index must be int32 or int64"),
    )
