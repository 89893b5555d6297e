"""Triton kernels: two matmuls with the features, each of which reads them once, and between them a softmax over the
tokens.

    forward:   scores = F A^T,   weights = softmax(scale * scores),           pooled = weights^T F
    backward:  dP = F dPooled^T, dS = scale * weights (dP - sum(weights dP)), dA = dS^T F

A query is a slot of a head: query q is slot q % slots of head q // slots. Weights, scores and their gradients have a
row for every token: (B * n, queries), with offsets (total, queries), float32. Tokens and columns are the tall side of
every matmul, so that 16 queries are enough for tensor cores. Prefixes: o_ offsets, m_ masks, b_ blocks in registers.
"""

import triton
import triton.language as tl

from ..shared_cross_attention.triton_tiles import LOG2E, rows_of_input, tile_of_rows


@triton.jit
def tokens_of_row(lengths, offsets, n, b):
    """Returns the first token of row b of the batch, as an index into weights, the number of tokens, and the number
    without padding.
    """
    first, tokens = rows_of_input(offsets, 1, n, b)
    if offsets is not None:
        end = tl.minimum(tl.maximum(first + tokens, 0), n)
        first = tl.minimum(tl.maximum(first, 0), n)
        tokens = (end - first).to(tl.int32)
    given = tokens
    if lengths is not None:
        given = tl.minimum(tl.maximum(tl.load(lengths + b).to(tl.int32), 0), n)
    return first, tokens, given


@triton.jit
def features_of_row(features, offsets, first, b, stride_fb, stride_fn):
    """Returns the pointer to the features of a row whose first token is ``first``."""
    if offsets is None:
        p = features + b.to(tl.int64) * stride_fb
    else:
        p = features + first * stride_fn
    return p


@triton.jit
def as_factor(b_f, dtype: tl.constexpr, BLACKWELL: tl.constexpr):
    """Returns features in ``dtype``, as an operand of a matmul.

    On Blackwell, Triton 3.6 multiplies float32 in TF32, whatever the requested precision, if it finds that an operand
    was loaded with fewer bits; 3.8 does not. It sees through casts of every kind, but not through a reduction, and
    reducing an axis of one element costs little.
    """
    b_factor = b_f.to(dtype)
    if BLACKWELL and b_f.dtype != dtype:
        b_factor = tl.sum(b_factor[None], 0)
    return b_factor


@triton.jit(do_not_specialize=["n", "batch", "slots", "queries"])
def label_cross_attention_scores_kernel(
    scores, queries_of, features, lengths, offsets,
    n, batch, slots, queries, d, stride_qh, stride_qb, stride_fb, stride_fn,
    BLACKWELL: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Computes a tile of scores. Grid: blocks of queries, then tiles of tokens.

    ``queries_of`` is (H, B, slots, d) with these strides; slots and columns are dense.
    """
    blocks = tl.cdiv(queries, BQ)
    b, first, tokens = tile_of_rows(offsets, 1, n, batch, tl.program_id(0) // blocks, BN)
    row, _, given = tokens_of_row(lengths, offsets, n, b)
    tokens = tl.where(first < row, 0, tl.minimum(tokens, given - (first - row).to(tl.int32)))
    if tokens <= 0:
        return
    o_n, o_k = tl.arange(0, BN), tl.arange(0, BK)
    o_q = tl.program_id(0) % blocks * BQ + tl.arange(0, BQ)
    m_n, m_q = o_n < tokens, o_q < queries
    p_f = features_of_row(features, offsets, row, b, stride_fb, stride_fn) + (first - row + o_n) * stride_fn  # [BN]
    # [BQ]
    p_q = (
        queries_of
        + b.to(tl.int64) * stride_qb
        + (o_q // slots).to(tl.int64) * stride_qh
        + (o_q % slots).to(tl.int64) * d
    )
    b_scores = tl.zeros([BN, BQ], tl.float32)
    for start in range(0, d, BK):
        m_k = start + o_k < d
        b_f = tl.load(p_f[:, None] + (start + o_k)[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)  # [BN, BK]
        b_q = tl.load(p_q[:, None] + (start + o_k)[None, :], mask=m_q[:, None] & m_k[None, :], other=0.0)  # [BQ, BK]
        b_scores = tl.dot(as_factor(b_f, b_q.dtype, BLACKWELL), tl.trans(b_q), b_scores, input_precision="ieee")
    p = scores + (first + o_n)[:, None] * queries + o_q[None, :]
    tl.store(p, b_scores, mask=m_n[:, None] & m_q[None, :])


@triton.jit
def block_of_weights(first, start, o_n, o_q, tokens, queries):
    """Returns offsets and mask, [BN, BQ], of the weights of the tokens from ``start`` on, counted from the row's first
    token.
    """
    o_t = start + o_n
    return (first + o_t)[:, None] * queries + o_q[None, :], (o_t < tokens)[:, None] & (o_q < queries)[None, :]


@triton.jit(do_not_specialize=["n", "queries"])
def label_cross_attention_softmax_kernel(
    scores, lengths, offsets, n, queries, scale, BN: tl.constexpr, BQ: tl.constexpr
):
    """Turns scores into weights in place, 0 in the padding. Grid: blocks of queries, then rows of the batch."""
    blocks = tl.cdiv(queries, BQ)
    first, tokens, given = tokens_of_row(lengths, offsets, n, tl.program_id(0) // blocks)
    o_n, o_q = tl.arange(0, BN), tl.program_id(0) % blocks * BQ + tl.arange(0, BQ)
    scale *= LOG2E  # in base 2: the hardware has exp2
    b_max = tl.full([BQ], float("-inf"), tl.float32)
    b_sum = tl.zeros([BN, BQ], tl.float32)
    for start in range(0, given, BN):
        o, m = block_of_weights(first, start, o_n, o_q, given, queries)
        b_scores = tl.where(m, tl.load(scores + o, mask=m, other=0.0) * scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, 0))
        # queries beyond the last have a maximum of -inf
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)[None, :]
        b_sum = b_sum * tl.exp2(b_max[None, :] - b_shift) + tl.exp2(b_scores - b_shift)
        b_max = b_new
    b_sum = tl.sum(b_sum, 0)
    b_sum = tl.where(b_sum == 0, 1.0, b_sum)[None, :]  # a row without features has weights of 0
    for start in range(0, tokens, BN):
        o, m = block_of_weights(first, start, o_n, o_q, given, queries)
        b_scores = tl.where(m, tl.load(scores + o, mask=m, other=0.0) * scale - b_max[None, :], float("-inf"))
        o, m = block_of_weights(first, start, o_n, o_q, tokens, queries)
        tl.store(scores + o, tl.exp2(b_scores) / b_sum, mask=m)


@triton.jit(do_not_specialize=["n", "queries"])
def label_cross_attention_softmax_bwd_kernel(
    grad_weights, weights, lengths, offsets, n, queries, scale, BN: tl.constexpr, BQ: tl.constexpr
):
    """Turns gradients of weights into gradients of scores in place, except in the padding.

    Grid: blocks of queries, then rows of the batch.
    """
    blocks = tl.cdiv(queries, BQ)
    first, _, given = tokens_of_row(lengths, offsets, n, tl.program_id(0) // blocks)
    o_n, o_q = tl.arange(0, BN), tl.program_id(0) % blocks * BQ + tl.arange(0, BQ)
    b_sum = tl.zeros([BN, BQ], tl.float32)
    for start in range(0, given, BN):
        o, m = block_of_weights(first, start, o_n, o_q, given, queries)
        b_sum += tl.load(weights + o, mask=m, other=0.0) * tl.load(grad_weights + o, mask=m, other=0.0)
    b_sum = tl.sum(b_sum, 0)[None, :]
    for start in range(0, given, BN):
        o, m = block_of_weights(first, start, o_n, o_q, given, queries)
        b_grad = (
            tl.load(weights + o, mask=m, other=0.0) * (tl.load(grad_weights + o, mask=m, other=0.0) - b_sum) * scale
        )
        tl.store(grad_weights + o, b_grad, mask=m)


@triton.jit(do_not_specialize=["n", "batch", "rows", "slots", "queries"])
def label_cross_attention_pool_kernel(
    out, weights, features, lengths, offsets,
    n, batch, rows, slots, queries, d, stride_oh, stride_op, stride_fb, stride_fn,
    WIDE: tl.constexpr, BLACKWELL: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Pools a tile of columns over ``rows`` rows of the batch, which are added up in order.

    Grid: blocks of queries, tiles of columns, then parts of the batch. ``out`` is (H, parts, slots, d) with these
    strides; slots and columns are dense. WIDE: the matmul is in float32.
    """
    blocks, tiles = tl.cdiv(queries, BQ), tl.cdiv(d, BD)
    o_q = tl.program_id(0) % blocks * BQ + tl.arange(0, BQ)
    o_d = tl.program_id(0) // blocks % tiles * BD + tl.arange(0, BD)
    part = tl.program_id(0) // blocks // tiles
    o_n = tl.arange(0, BN)
    m_q, m_d = o_q < queries, o_d < d
    b_out = tl.zeros([BD, BQ], tl.float32)
    for i in range(0, tl.minimum(rows, batch - part * rows)):
        b = part * rows + i
        first, _, given = tokens_of_row(lengths, offsets, n, b)
        p_f = features_of_row(features, offsets, first, b, stride_fb, stride_fn)
        for start in range(0, given, BN):
            o_t = start + o_n
            p = p_f + o_t.to(tl.int64)[:, None] * stride_fn + o_d[None, :]
            b_f = tl.load(p, mask=(o_t < given)[:, None] & m_d[None, :], other=0.0)  # [BN, BD]
            if WIDE:
                b_f = as_factor(b_f, tl.float32, BLACKWELL)
            o, m = block_of_weights(first, start, o_n, o_q, given, queries)
            b_w = tl.load(weights + o, mask=m, other=0.0)  # [BN, BQ]
            b_out = tl.dot(tl.trans(b_f), b_w.to(b_f.dtype), b_out, input_precision="ieee")
    p = (
        out
        + part.to(tl.int64) * stride_op
        + (o_q // slots).to(tl.int64)[None, :] * stride_oh
        + (o_q % slots).to(tl.int64)[None, :] * d
    )
    tl.store(p + o_d[:, None], b_out.to(out.dtype.element_ty), mask=m_d[:, None] & m_q[None, :])
