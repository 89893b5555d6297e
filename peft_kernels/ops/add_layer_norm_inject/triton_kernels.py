"""Triton kernels: a program keeps BR whole rows of d columns, one token each, in registers between reading and writing
them.

Prefixes: o_ offsets, m_ masks, b_ blocks in registers. Offsets computed from strides are 64-bit.
"""

import triton
import triton.language as tl

from ..special_tokens.triton_kernels import adapters_of, load_vectors


@triton.jit
def _slots_of(slots, o_row, o_s, mask, slots_per_row, stride_sb, stride_sj, BK: tl.constexpr):
    """Returns the slot of each token in its row, [BR]; -1: none."""
    b_slot = o_row * 0 - 1
    for start in range(0, slots_per_row, BK):
        o_j = start + tl.arange(0, BK)
        p = slots + o_row.to(tl.int64)[:, None] * stride_sb + o_j.to(tl.int64)[None, :] * stride_sj
        b_position = tl.load(p, mask=mask[:, None] & (o_j < slots_per_row)[None, :], other=-1).to(tl.int32)  # [BR, BK]
        b_slot = tl.maximum(b_slot, tl.max(tl.where(b_position == o_s[:, None], o_j[None, :], -1), 1))
    return b_slot


@triton.jit
def _inject(b_x, vectors, seed, threshold, scale, o_row, b_slot, b_adapter, o_d, m_d, vectors_per_adapter, d):
    if tl.max(b_slot, 0) >= 0:
        mask = (b_slot >= 0)[:, None] & m_d[None, :]
        b_slot, b_adapter = tl.maximum(b_slot, 0), tl.maximum(b_adapter, 0)
        b_added = load_vectors(
            vectors, seed, threshold, scale, o_row, b_slot, b_adapter, o_d, vectors_per_adapter, d, mask
        )
        b_x += tl.where(mask, b_added, 0.0)
    return b_x


@triton.jit(
    do_not_specialize=[
        "tokens",
        "length",
        "slots_per_row",
        "adapters",
        "vectors_per_adapter",
        "threshold",
        "stride_sb",
        "stride_sj",
        "stride_k",
    ]
)
def add_layer_norm_inject_fwd_kernel(
    out, total, mean, rstd, x, residual, weight, bias, vectors, slots, adapter_ids, seed,
    tokens, length, slots_per_row, adapters, vectors_per_adapter, d, eps, threshold, scale,
    stride_xb, stride_xs, stride_rb, stride_rs, stride_sb, stride_sj, stride_k,
    RMS: tl.constexpr, PRE: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Computes BR rows of the result. Grid: blocks of BR tokens of the batch.

    Arguments that are None are neither read nor written.
    """
    o_t = tl.program_id(0) * BR + tl.arange(0, BR)
    o_row, o_s, o_d = o_t // length, o_t % length, tl.arange(0, BD)
    m_t, m_d = o_t < tokens, o_d < d
    mask = m_t[:, None] & m_d[None, :]  # [BR, BD]
    o_out = o_t.to(tl.int64)[:, None] * d + o_d[None, :]
    p_x = x + (o_row.to(tl.int64) * stride_xb + o_s.to(tl.int64) * stride_xs)[:, None] + o_d[None, :]
    p_residual = residual + (o_row.to(tl.int64) * stride_rb + o_s.to(tl.int64) * stride_rs)[:, None] + o_d[None, :]
    b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32) + tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
    if vectors is not None:
        b_adapter = adapters_of(adapter_ids, o_row, stride_k, adapters, m_t)
        b_slot = _slots_of(slots, o_row, o_s, m_t, slots_per_row, stride_sb, stride_sj, BK)
        b_slot = tl.where(b_adapter >= 0, b_slot, -1)
        if PRE:
            b_x = _inject(
                b_x, vectors, seed, threshold, scale, o_row, b_slot, b_adapter, o_d, m_d, vectors_per_adapter, d
            )
    b_total = b_x.to(out.dtype.element_ty)
    if total is not None:
        tl.store(total + o_out, b_total, mask=mask)
    b_x = b_total.to(tl.float32)
    if not RMS:
        b_mean = tl.sum(b_x, 1) / d
        if mean is not None:
            tl.store(mean + o_t, b_mean, mask=m_t)
        b_x = tl.where(mask, b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / d + eps)
    if rstd is not None:
        tl.store(rstd + o_t, b_rstd, mask=m_t)
    b_x = b_x * b_rstd[:, None] * tl.load(weight + o_d, mask=m_d, other=0.0)[None, :]
    if bias is not None:
        b_x += tl.load(bias + o_d, mask=m_d, other=0.0)[None, :]
    if vectors is not None and not PRE:
        b_x = _inject(b_x, vectors, seed, threshold, scale, o_row, b_slot, b_adapter, o_d, m_d, vectors_per_adapter, d)
    tl.store(out + o_out, b_x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "length", "slots_per_row", "stride_sb", "stride_sj"])
def add_layer_norm_inject_bwd_kernel(
    grad_x, grad_slots, grad, grad_sum, total, mean, rstd, weight, slots,
    tokens, length, slots_per_row, d, stride_gb, stride_gs, stride_tb, stride_ts, stride_sb, stride_sj,
    LISTED: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Computes BR rows of the gradient of the sum. Grid: blocks of BR tokens of the batch; LISTED: of BR slots, (B, k),
    alone.

    grad_x, (B, S, d), gets every row of the gradient; grad_slots, (B, k, d) float32, gets the rows of special tokens
    before rounding. The rows of slots out of range are not written.
    """
    o_t = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_t, m_d = o_t < tokens, o_d < d
    if LISTED:
        o_row, b_slot = o_t // slots_per_row, o_t % slots_per_row
        o_s = tl.load(slots + o_row.to(tl.int64) * stride_sb + b_slot.to(tl.int64) * stride_sj, mask=m_t, other=-1).to(
            tl.int32
        )
        m_t = m_t & (o_s >= 0) & (o_s < length)
        o_t = o_row.to(tl.int64) * length + o_s
    else:
        o_row, o_s = o_t // length, o_t % length
        if grad_slots is not None:
            b_slot = _slots_of(slots, o_row, o_s, m_t, slots_per_row, stride_sb, stride_sj, BK)
    mask = m_t[:, None] & m_d[None, :]  # [BR, BD]
    o_x = o_t.to(tl.int64)[:, None] * d + o_d[None, :]
    p_grad = grad + (o_row.to(tl.int64) * stride_gb + o_s.to(tl.int64) * stride_gs)[:, None] + o_d[None, :]
    b_x = tl.load(total + o_x, mask=mask, other=0.0).to(tl.float32)
    b_grad = tl.load(p_grad, mask=mask, other=0.0).to(tl.float32) * tl.load(weight + o_d, mask=m_d, other=0.0)[None, :]
    if mean is not None:
        b_x -= tl.load(mean + o_t, mask=m_t, other=0.0)[:, None]
    b_rstd = tl.load(rstd + o_t, mask=m_t, other=0.0)
    b_x *= b_rstd[:, None]
    b_dx = b_grad - b_x * (tl.sum(b_grad * b_x, 1) / d)[:, None]  # past the last column b_grad is 0
    if mean is not None:
        b_dx -= (tl.sum(b_grad, 1) / d)[:, None]
    b_dx *= b_rstd[:, None]
    if grad_sum is not None:
        p_sum = grad_sum + (o_row.to(tl.int64) * stride_tb + o_s.to(tl.int64) * stride_ts)[:, None] + o_d[None, :]
        b_dx += tl.load(p_sum, mask=mask, other=0.0).to(tl.float32)
    if grad_x is not None:
        tl.store(grad_x + o_x, b_dx.to(grad_x.dtype.element_ty), mask=mask)
    if grad_slots is not None:
        p_slots = grad_slots + (o_row.to(tl.int64) * slots_per_row + b_slot)[:, None] * d + o_d[None, :]
        tl.store(p_slots, b_dx, mask=mask & (b_slot >= 0)[:, None])
