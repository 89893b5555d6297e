"""Backward kernels. One program computes each element of a gradient completely, so there are no atomics and repeats are
bit-equal.

The formulas of reference.py, with the probabilities recomputed from lse:
    P = exp(scale Q K^T - lse),  dS = P (dO V^T - delta),  delta = rowsum(dO O) - dlse
    dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K
"""

import triton
import triton.language as tl

from .triton_tiles import LOG2E, dot_over_d, length_of_input, load_tile, rows_of_input, tile_of_rows


@triton.jit(do_not_specialize=["row_heads", "tokens"])
def shared_cross_attention_bwd_delta_kernel(
    grad_out, out, grad_lse, delta, row_heads, tokens, heads,
    stride_gr, stride_gh, stride_or, stride_oh, stride_ln, stride_lh, stride_lt,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Computes ``delta``, (rows, heads) in float32; ``grad_lse`` is (N, heads, tokens) with any strides, or None."""
    index = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    m_r = index < row_heads
    row, h = index // heads, index % heads
    o_d = tl.arange(0, BLOCK_D)
    m = m_r[:, None] & (o_d < D)[None, :]  # [BR, BLOCK_D]
    b_g = tl.load(grad_out + (row * stride_gr + h * stride_gh)[:, None] + o_d[None, :], mask=m, other=0.0).to(
        tl.float32
    )
    b_o = tl.load(out + (row * stride_or + h * stride_oh)[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_g * b_o, 1)
    if grad_lse is not None:
        p_lse = grad_lse + row // tokens * stride_ln + h * stride_lh + row % tokens * stride_lt
        b_delta -= tl.load(p_lse, mask=m_r, other=0.0).to(tl.float32)
    tl.store(delta + index, b_delta, mask=m_r)


@triton.jit(do_not_specialize=["tokens", "rows_per_input", "n"])
def shared_cross_attention_bwd_key_value_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, key_lengths, cu_streams,
    tokens, rows_per_input, n, scale,
    stride_qr, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_gr, stride_gh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of one block of keys from all rows of its input's streams. Grid: (inputs * blocks of keys,
    heads).

    ``grad_k`` and ``grad_v`` are (inputs, n, heads, D); one that is None is not computed. Scores are transposed, keys
    by rows, so that the block of keys is the tall side of every matmul.
    """
    h, heads = tl.program_id(1), tl.num_programs(1)
    blocks = tl.cdiv(n, BN)
    i, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BN
    keys = length_of_input(key_lengths, n, i) - start
    first, rows = rows_of_input(cu_streams, tokens, rows_per_input, i)
    rows = tl.where(keys > 0, rows, 0)  # a block of padding is written as 0

    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    m_n = o_n < keys
    # [BN]
    p_k = k + i.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh + start.to(tl.int64) * stride_kn + o_n * stride_kn
    p_v = v + i.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh + start.to(tl.int64) * stride_vn + o_n * stride_vn
    q += first * stride_qr + h.to(tl.int64) * stride_qh
    grad_out += first * stride_gr + h.to(tl.int64) * stride_gh
    lse += first * heads + h
    b_k = load_tile(p_k, m_n, 0, D, BLOCK_D, True)  # [BN, BLOCK_D]
    if grad_k is not None:
        b_v = load_tile(p_v, m_n, 0, D, BLOCK_D, True)  # [BN, BLOCK_D]
        b_grad_k = tl.zeros([BN, BLOCK_D], tl.float32)
        delta += first * heads + h
    if grad_v is not None:
        b_grad_v = tl.zeros([BN, BLOCK_D], tl.float32)

    qk_scale = scale * LOG2E
    for done in range(0, rows, BM):
        m_m = o_m < rows - done
        p_q, p_g = q + o_m * stride_qr, grad_out + o_m * stride_gr  # [BM]
        b_q = load_tile(p_q, m_m, 0, D, BLOCK_D, True)  # [BM, BLOCK_D]
        b_lse = tl.load(lse + o_m * heads, mask=m_m, other=float("inf"))  # [BM], a masked row gets P = 0
        b_s = dot_over_d(b_k, p_k, m_n, b_q, p_q, m_m, D, BLOCK_D, BK, True)  # [BN, BM]
        b_p = tl.exp2(b_s * qk_scale - (b_lse * LOG2E)[None, :])
        b_g = load_tile(p_g, m_m, 0, D, BLOCK_D, True)  # [BM, BLOCK_D]
        if grad_v is not None:
            b_grad_v = tl.dot(b_p.to(b_g.dtype), b_g, b_grad_v, input_precision="ieee")  # [BN, BLOCK_D]
        if grad_k is not None:
            b_delta = tl.load(delta + o_m * heads, mask=m_m, other=0.0)
            b_dp = dot_over_d(b_v, p_v, m_n, b_g, p_g, m_m, D, BLOCK_D, BK, True)  # [BN, BM]
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_grad_k = tl.dot(b_ds.to(b_q.dtype), b_q, b_grad_k, input_precision="ieee")  # [BN, BLOCK_D]
            delta += BM * heads
        q += BM * stride_qr
        grad_out += BM * stride_gr
        lse += BM * heads

    o_d = tl.arange(0, BLOCK_D)
    o_grad = ((i.to(tl.int64) * n + start) * heads + h) * D + o_n[:, None] * (heads * D) + o_d[None, :]  # [BN, BLOCK_D]
    m_grad = (o_n < n - start)[:, None] & (o_d < D)[None, :]
    # Padded keys were loaded as 0, which gives their rows a nonzero P; these rows are replaced by 0 here.
    if grad_k is not None:
        tl.store(
            grad_k + o_grad, tl.where(m_n[:, None], b_grad_k * scale, 0.0).to(grad_k.dtype.element_ty), mask=m_grad
        )
    if grad_v is not None:
        tl.store(grad_v + o_grad, tl.where(m_n[:, None], b_grad_v, 0.0).to(grad_v.dtype.element_ty), mask=m_grad)


@triton.jit
def _query_grad_block(
    b_q, p_q, b_g, p_g, m_m, b_lse, b_delta, b_grad, p_k, p_v, m_n, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    b_k = load_tile(p_k, m_n, 0, D, BLOCK_D, MASKED)  # [BN, BLOCK_D]
    b_v = load_tile(p_v, m_n, 0, D, BLOCK_D, MASKED)
    # [BM, BN]
    b_p = tl.exp2(dot_over_d(b_q, p_q, m_m, b_k, p_k, m_n, D, BLOCK_D, BK, MASKED) * qk_scale - b_lse[:, None])
    b_ds = b_p * (dot_over_d(b_g, p_g, m_m, b_v, p_v, m_n, D, BLOCK_D, BK, MASKED) - b_delta[:, None])
    if MASKED:
        b_ds = tl.where(m_n[None, :], b_ds, 0.0)  # P of a padded key can be inf, and inf * 0 is NaN
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_grad, input_precision="ieee")  # [BM, BLOCK_D]


@triton.jit(do_not_specialize=["tokens", "rows_per_input", "inputs", "n"])
def shared_cross_attention_bwd_query_kernel(
    q, k, v, grad_out, lse, delta, grad_q, key_lengths, cu_streams,
    tokens, rows_per_input, inputs, n, scale,
    stride_qr, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_gr, stride_gh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of a tile of query rows. Grid: (tiles of rows, heads). ``grad_q`` is (rows, heads, D)."""
    h, heads = tl.program_id(1), tl.num_programs(1)
    i, row, rows = tile_of_rows(cu_streams, tokens, rows_per_input, inputs, tl.program_id(0), BM)
    if rows <= 0:
        return
    length = length_of_input(key_lengths, n, i)
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    m_m = o_m < rows
    p_q = q + row * stride_qr + h.to(tl.int64) * stride_qh + o_m * stride_qr  # [BM]
    p_g = grad_out + row * stride_gr + h.to(tl.int64) * stride_gh + o_m * stride_gr
    b_q, b_g = load_tile(p_q, m_m, 0, D, BLOCK_D, True), load_tile(p_g, m_m, 0, D, BLOCK_D, True)  # [BM, BLOCK_D]
    b_lse = tl.load(lse + row * heads + h + o_m * heads, mask=m_m, other=0.0) * LOG2E  # [BM]
    b_delta = tl.load(delta + row * heads + h + o_m * heads, mask=m_m, other=0.0)
    k += i.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    v += i.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
    o_k, o_v = o_n * stride_kn, o_n * stride_vn  # [BN]

    qk_scale = scale * LOG2E
    b_grad = tl.zeros([BM, BLOCK_D], tl.float32)
    MASK_ALL: tl.constexpr = BK < BLOCK_D
    whole = 0 if MASK_ALL else length // BN * BN
    if not MASK_ALL:
        for _ in range(0, whole, BN):
            b_grad = _query_grad_block(
                b_q, p_q, b_g, p_g, m_m, b_lse, b_delta, b_grad, k + o_k, v + o_v, o_n < BN, qk_scale, D, BLOCK_D, BK,
                False
            )  # fmt: skip
            k += BN * stride_kn
            v += BN * stride_vn
    for start in range(whole, length, BN):
        b_grad = _query_grad_block(
            b_q, p_q, b_g, p_g, m_m, b_lse, b_delta, b_grad, k + o_k, v + o_v, o_n < length - start, qk_scale, D,
            BLOCK_D, BK, True
        )  # fmt: skip
        k += BN * stride_kn
        v += BN * stride_vn

    o_d = tl.arange(0, BLOCK_D)
    o_grad = (row * heads + h) * D + o_m[:, None] * (heads * D) + o_d[None, :]  # [BM, BLOCK_D]
    tl.store(grad_q + o_grad, (b_grad * scale).to(grad_q.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])
