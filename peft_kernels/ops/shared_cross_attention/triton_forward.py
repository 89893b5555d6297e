"""Forward kernels: attention of a tile of rows over a range of the input's keys, and the merge of several ranges."""

import triton
import triton.language as tl

from .triton_tiles import LN2, LOG2E, dot_over_d, length_of_input, load_tile, tile_of_rows


@triton.jit
def _attend_block(
    b_q,
    p_q,
    m_m,
    b_out,
    b_max,
    b_sum,
    p_k,
    p_v,
    m_n,
    qk_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds one block of keys to the online softmax, in base 2: exp2 is the hardware's exponential."""
    b_k = load_tile(p_k, m_n, 0, D, BLOCK_D, MASKED)  # [BN, BLOCK_D]
    b_s = dot_over_d(b_q, p_q, m_m, b_k, p_k, m_n, D, BLOCK_D, BK, MASKED)  # [BM, BN]
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * qk_scale)  # [BM]
    b_p = tl.exp2(b_s * qk_scale - b_new[:, None])
    if MASKED:
        b_p = tl.where(m_n[None, :], b_p, 0.0)  # masked again: with scale 0 a masked score is not -inf any more
    b_alpha = tl.exp2(b_max - b_new)
    b_v = load_tile(p_v, m_n, 0, D, BLOCK_D, MASKED)  # [BN, BLOCK_D]
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_alpha[:, None], input_precision="ieee")  # [BM, BLOCK_D]
    return b_out, b_new, b_sum * b_alpha + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=["tokens", "rows_per_input", "total_rows", "inputs", "n"])
def shared_cross_attention_fwd_kernel(
    q, k, v, out, lse, key_lengths, cu_streams,
    tokens, rows_per_input, total_rows, inputs, n, scale,
    stride_qr, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Attends from a tile of rows to one split of the keys. Grid: (tiles of rows, heads, splits).

    ``out`` is (splits, rows, heads, D), ``lse`` (splits, rows, heads) or None.
    """
    h, split = tl.program_id(1), tl.program_id(2)
    heads, splits = tl.num_programs(1), tl.num_programs(2)
    i, row, rows = tile_of_rows(cu_streams, tokens, rows_per_input, inputs, tl.program_id(0), BM)
    if rows <= 0:
        return
    # The input's own blocks are divided evenly over the splits, independent of the longest input.
    length = length_of_input(key_lengths, n, i)
    blocks = tl.cdiv(length, BN)
    begin = blocks * split // splits * BN
    end = tl.minimum(blocks * (split + 1) // splits * BN, length)

    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    m_m = o_m < rows
    p_q = q + row * stride_qr + h.to(tl.int64) * stride_qh + o_m * stride_qr  # [BM], one pointer per row
    b_q = load_tile(p_q, m_m, 0, D, BLOCK_D, True)  # [BM, BLOCK_D]
    k += i.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh + begin.to(tl.int64) * stride_kn
    v += i.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh + begin.to(tl.int64) * stride_vn
    o_k, o_v = o_n * stride_kn, o_n * stride_vn  # [BN]

    qk_scale = scale * LOG2E
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, BLOCK_D], tl.float32)
    # Tiles of many rows are compute-bound: only the last block pays for masks, in a loop of its own. Tiles of few rows
    # are memory-bound.
    MASK_ALL: tl.constexpr = BM < 64 or BK < BLOCK_D
    whole = begin if MASK_ALL else begin + (end - begin) // BN * BN
    if not MASK_ALL:
        for _ in range(begin, whole, BN):
            b_out, b_max, b_sum = _attend_block(
                b_q, p_q, m_m, b_out, b_max, b_sum, k + o_k, v + o_v, o_n < BN, qk_scale, D, BLOCK_D, BK, False
            )  # fmt: skip
            k += BN * stride_kn
            v += BN * stride_vn
    for start in range(whole, end, BN):
        b_out, b_max, b_sum = _attend_block(
            b_q, p_q, m_m, b_out, b_max, b_sum, k + o_k, v + o_v, o_n < end - start, qk_scale, D, BLOCK_D, BK, True
        )  # fmt: skip
        k += BN * stride_kn
        v += BN * stride_vn

    row += split.to(tl.int64) * total_rows
    b_out = b_out / tl.where(b_sum == 0, 1.0, b_sum)[:, None]  # a row without keys is 0
    o_d = tl.arange(0, BLOCK_D)
    o_out = o_m[:, None] * (heads * D) + o_d[None, :]  # [BM, BLOCK_D]
    tl.store(
        out + (row * heads + h) * D + o_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :]
    )
    if lse is not None:
        tl.store(lse + row * heads + h + o_m * heads, b_max * LN2 + tl.log(b_sum), mask=m_m)


@triton.jit(do_not_specialize=["row_heads", "splits"])
def shared_cross_attention_fwd_merge_kernel(
    partial_out, partial_lse, out, lse, row_heads, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BR: tl.constexpr
):
    """Combines the outputs of the splits, (splits, row_heads, D), weighted by their shares of the softmax.

    A split without keys has lse -inf.
    """
    first = tl.program_id(0).to(tl.int64) * BR
    o_r, o_d = tl.arange(0, BR), tl.arange(0, BLOCK_D)
    m_r = o_r < row_heads - first
    m_out = m_r[:, None] & (o_d < D)[None, :]  # [BR, BLOCK_D]
    o_out = first * D + o_r[:, None] * D + o_d[None, :]
    p_lse, p_out = partial_lse + first + o_r, partial_out + o_out
    b_max = tl.full([BR], float("-inf"), tl.float32)
    b_sum = tl.zeros([BR], tl.float32)
    b_out = tl.zeros([BR, BLOCK_D], tl.float32)
    for _ in range(splits):
        b_lse = tl.load(p_lse, mask=m_r, other=float("-inf"))  # [BR]
        b_new = tl.maximum(b_max, b_lse)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_old, b_weight = tl.exp(b_max - b_shift), tl.exp(b_lse - b_shift)
        b_out = b_out * b_old[:, None] + tl.load(p_out, mask=m_out, other=0.0) * b_weight[:, None]
        b_sum = b_sum * b_old + b_weight
        b_max = b_new
        p_lse += row_heads
        p_out += row_heads.to(tl.int64) * D
    b_out = b_out / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_out)
    if lse is not None:
        tl.store(lse + first + o_r, b_max + tl.log(b_sum), mask=m_r)
