"""Every implementation in plain PyTorch, and ``auto``, against attention written out stream by stream in float64."""

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import impl_fixture
from shared_cross_attention_cases import (
    CASES,
    DTYPES,
    IMPLS,
    assert_no_worse_than_plain,
    attention,
    by_hand,
    grads_of,
    make,
    results,
)
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels.ops import shared_cross_attention
from peft_kernels.ops.shared_cross_attention import choose, implementations, reference

impl = impl_fixture(implementations, *IMPLS)


@pytest.mark.parametrize("through_lse", [False, True], ids=["out", "out-and-lse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_plain(case, dtype, through_lse, impl, device):
    tensors, where = make(CASES[case], dtype, device)
    assert_no_worse_than_plain(attention(impl), tensors, where, grads_of(tensors[0], through_lse))


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_formula(case, device):
    """Compare in float64: the reference is the truth of other tests."""
    tensors, where = make(CASES[case], torch.float64, device)
    grads = grads_of(tensors[0])
    got = results(attention("reference"), tensors, grads, **where)
    assert_within_rounding(got, lambda: results(by_hand, tensors, grads, **where))


@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
def test_scale(scale, impl, device):
    tensors, where = make(CASES["ragged-lengths"], device=device)
    assert_no_worse_than_plain(attention(impl), tensors, where, grads_of(tensors[0]), scale=scale)


LAYOUTS = {
    "token-major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every-other": lambda x: torch.stack([x, x + 1], -1).flatten(3)[..., ::2],
    "one-head-for-all": lambda x: x[:, :1].expand_as(x),
    "one-token-for-all": lambda x: x[:, :, :1].expand_as(x),
    "one-batch-for-all": lambda x: x[:1].expand_as(x),
    "one-number-for-all": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "width-first": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("case", ["uniform", "ragged-lengths"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, case, impl, device):
    (query, key, value), where = make(CASES[case], device=device)
    if "all" in layout:  # otherwise the padding's NaN would spread everywhere
        key, value = key.nan_to_num(0.5), value.nan_to_num(0.5)
    tensors = [LAYOUTS[layout](x) for x in (query, key, value)]
    assert not tensors[0].is_contiguous()
    assert_no_worse_than_plain(attention(impl), tensors, where, grads_of(query))


@pytest.mark.parametrize("layout", ["token-major", "one-head-for-all", "width-first", "one-number-for-all"])
def test_strides_of_the_incoming_gradient(layout, impl, device):
    tensors, where = make(CASES["lengths"], device=device)
    grads = [LAYOUTS[layout](grads_of(tensors[0])[0]), None]
    assert_no_worse_than_plain(attention(impl), tensors, where, grads)


def test_results_are_token_major(impl, device):
    for case in ("uniform", "ragged-lengths"):
        tensors, where = make(CASES[case], device=device)
        out, lse = attention(impl)(*tensors, **where)
        assert out.transpose(1, 2).is_contiguous() and lse.transpose(1, 2).is_contiguous()
        assert lse.dtype == torch.float32


def test_padding_gets_no_gradient(impl, device):
    tensors, where = make(CASES["ragged-lengths"], device=device)
    _, _, _, *grads = results(attention(impl), tensors, grads_of(tensors[0]), **where)
    for grad in grads:
        for i, length in enumerate(where["key_lengths"].tolist()):
            assert not grad[i, :, length:].any()
    assert not any(grad[i].any() for grad in grads for i in (0, 2, 5))  # without streams, without keys, without streams


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 3, 5, 7, 16), (0, 0, 3, 5, 7, 16), (6, 2, 3, 0, 7, 16), (6, 2, 3, 5, 0, 16), (6, 2, 0, 5, 7, 16)],
    ids=str,
)
@pytest.mark.parametrize("extra", ["none", "lengths", "index", "both"])
def test_empty(shape, extra, impl, device):
    streams, inputs, *_ = shape
    lengths = [shape[4]] * inputs if extra in ("lengths", "both") else None
    index = sorted(u % max(inputs, 1) for u in range(streams)) if extra in ("index", "both") else None
    tensors, where = make((shape, lengths, index), device=device)
    out, lse, *grads = results(attention(impl), tensors, grads_of(tensors[0]), **where)
    assert out.shape == tensors[0].shape and lse.shape == tensors[0].shape[:3]
    assert not out.any() and (lse == -torch.inf).all()
    assert [g.shape for g in grads] == [x.shape for x in tensors] and not any(g.any() for g in grads)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    small = st.integers(1, 5)
    inputs, heads, tokens, keys, width = (
        data.draw(s) for s in (small, st.integers(1, 3), small, st.integers(1, 40), st.integers(1, 70))
    )
    index = data.draw(st.none() | st.lists(st.integers(0, inputs - 1), min_size=1, max_size=9).map(sorted))
    lengths = data.draw(st.none() | st.lists(st.integers(0, keys), min_size=inputs, max_size=inputs))
    streams = inputs * data.draw(st.integers(1, 3)) if index is None else len(index)
    tensors, where = make(
        ((streams, inputs, heads, tokens, keys, width), lengths, index), seed=data.draw(st.integers(0, 99))
    )
    impl = data.draw(st.sampled_from(IMPLS))
    assert_no_worse_than_plain(attention(impl), tensors, where, grads_of(tensors[0], data.draw(st.booleans())))


@pytest.mark.parametrize("case", ["uniform", "lengths", "ragged-lengths", "all-empty"])
@pytest.mark.parametrize("name", ["reference", "sdpa", "matmul"])
def test_gradcheck(case, name):
    tensors, where = make(CASES[case], torch.float64)
    tensors = [x.nan_to_num(0.5)[..., :6].detach().requires_grad_() for x in tensors]

    def attend(*tensors):
        out, lse = shared_cross_attention(*tensors, **where, return_lse=True, impl=name)
        return out, lse.nan_to_num(neginf=0.0)

    assert torch.autograd.gradcheck(attend, tensors)


def test_float64_takes_the_reference(device):
    tensors, where = make(CASES["ragged-lengths"], torch.float64, device)
    assert choose(tensors[0], tensors[1]) == "reference"
    expected = reference.forward(*tensors, **where, scale=0.2)
    for a, b in zip(shared_cross_attention(*tensors, **where, scale=0.2, return_lse=True), expected):
        assert torch.equal(a, b) and a.dtype == torch.float64


@pytest.mark.parametrize(("tokens", "amx", "expected"), [(16, True, "sdpa"), (15, True, "cpp"), (16, False, "cpp")])
def test_bfloat16_takes_the_library_on_amx_tiles(tokens, amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(implementations, "unavailable", lambda *_: None)
    query, key = torch.empty(8, 2, tokens, 8, dtype=torch.bfloat16), torch.empty(2, 2, 5, 8, dtype=torch.bfloat16)
    assert choose(query, key) == expected
    assert choose(query.float(), key.float()) == "cpp"


@pytest.mark.parametrize("frozen", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0)], ids=str)
def test_frozen_inputs_get_no_gradient(frozen, impl, device):
    tensors, where = make(CASES["ragged-lengths"], device=device)
    grads = grads_of(tensors[0])
    everything = WithinRounding(lambda: results(attention(impl), tensors, grads, **where)[2:])
    leaves = [x.requires_grad_(not f) for x, f in zip(tensors, frozen)]
    out = shared_cross_attention(*leaves, **where, impl=impl)
    torch.autograd.backward(attention(impl)(*leaves, **where), [g.to(out.dtype) for g in grads])
    assert [leaf.grad is None for leaf in leaves] == [bool(f) for f in frozen]
    everything.check([leaf.grad for leaf in leaves], partial=True)


@pytest.mark.parametrize(
    ("needs", "products"), [((1, 1, 1), 5), ((1, 0, 0), 3), ((0, 1, 0), 3), ((0, 0, 1), 2), ((1, 0, 1), 4)], ids=str
)
def test_frozen_inputs_get_no_work(needs, products):
    """S and dP once, then one matmul for each gradient; dP only if dS is needed."""
    (query, key, value), _ = make(CASES["uniform"])
    module = implementations.module("matmul")
    out, lse = module.forward(query, key, value, None, None, 0.3, True)
    with FlopCounterMode(display=False) as flops:
        module.backward(out, None, query, key, value, out, lse, None, None, 0.3, *map(bool, needs))
    streams, heads, tokens, width = query.shape
    assert flops.get_total_flops() == products * 2 * streams * heads * tokens * key.shape[2] * width


def test_nothing_is_kept_without_gradients(device):
    tensors, where = make(CASES["uniform"], device=device)
    assert not shared_cross_attention(*tensors).requires_grad
    with torch.no_grad():
        assert shared_cross_attention(*(x.requires_grad_() for x in tensors)).grad_fn is None
