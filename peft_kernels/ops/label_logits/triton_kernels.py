"""Triton kernels: dot products of a few words with one row of every text. The result of a text does not depend on the
rest of the batch.

They multiply in float32, without tensor cores: reading the rows of a few words takes less time than filling a
tensor-core tile with them. Prefixes: o_ offsets, m_ masks, b_ blocks in registers. Strides are in elements; offsets
computed from them are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def load_ids(label_ids, o_w, words, vocabulary):
    """Loads the ids of words, [BW]; -1 past the last word, and for an id out of range."""
    b_id = tl.load(label_ids + o_w, mask=o_w < words, other=-1).to(tl.int64)
    return tl.where(b_id < vocabulary, b_id, -1)


@triton.jit
def load_words(weight, b_id, o_d, d, stride_wv, stride_wd):
    """Loads the rows of the words ``b_id``, [BW, BD], as float32; 0 for -1."""
    p = weight + b_id[:, None] * stride_wv + o_d.to(tl.int64)[None, :] * stride_wd
    return tl.load(p, mask=(b_id >= 0)[:, None] & (o_d < d)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "words", "vocabulary", "stride_b", "stride_p"])
def label_logits_fwd_kernel(
    out, hidden, weight, label_ids, bias, positions,
    length, words, vocabulary, d, stride_hb, stride_hs, stride_hd, stride_wv, stride_wd, stride_b, stride_p,
    BW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Computes the logits of BW words in one text. Grid: blocks of words, then texts. ``out`` is (B, words).

    A word that is none, or whose id is out of range, gets -inf; a position out of range gives NaN.
    """
    blocks = tl.cdiv(words, BW)
    text = (tl.program_id(0) // blocks).to(tl.int64)
    o_w = tl.program_id(0) % blocks * BW + tl.arange(0, BW)
    b_id = load_ids(label_ids, o_w, words, vocabulary)
    hidden += text * stride_hb
    if positions is not None:
        position = tl.load(positions + text * stride_p).to(tl.int64)
        inside = (position >= 0) & (position < length)
        hidden += tl.where(inside, position, 0) * stride_hs
    b_sum = tl.zeros([BW, BD], tl.float32)
    for start in range(0, d, BD):
        o_d = start + tl.arange(0, BD)
        b_hidden = tl.load(hidden + o_d.to(tl.int64) * stride_hd, mask=o_d < d, other=0.0).to(tl.float32)  # [BD]
        b_sum += load_words(weight, b_id, o_d, d, stride_wv, stride_wd) * b_hidden[None, :]
    b_out = tl.sum(b_sum, 1)  # [BW]
    if bias is not None:
        b_out += tl.load(bias + b_id * stride_b, mask=b_id >= 0, other=0.0).to(tl.float32)
    if positions is not None:
        b_out = tl.where(inside, b_out, float("nan"))
    tl.store(out + text * words + o_w, tl.where(b_id >= 0, b_out, float("-inf")), mask=o_w < words)


@triton.jit(do_not_specialize=["words", "vocabulary"])
def label_logits_bwd_kernel(
    grad_rows, grad_words, weight, label_ids,
    words, vocabulary, d, stride_wv, stride_wd,
    BW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Computes BD columns of the gradient of one text's row. Grid: tiles of columns, then texts.

    ``grad_rows`` is (B, d), ``grad_words`` (B, words).
    """
    tiles = tl.cdiv(d, BD)
    text = (tl.program_id(0) // tiles).to(tl.int64)
    o_d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    b_sum = tl.zeros([BW, BD], tl.float32)
    for start in range(0, words, BW):
        o_w = start + tl.arange(0, BW)
        b_id = load_ids(label_ids, o_w, words, vocabulary)
        b_grad = tl.load(grad_words + text * words + o_w, mask=b_id >= 0, other=0.0)  # [BW]
        b_sum += load_words(weight, b_id, o_d, d, stride_wv, stride_wd) * b_grad[:, None]
    tl.store(grad_rows + text * d + o_d, tl.sum(b_sum, 0), mask=o_d < d)
