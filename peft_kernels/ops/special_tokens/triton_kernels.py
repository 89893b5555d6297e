"""Triton kernels. Every element of a result is written by one program.

A position or adapter out of range counts as none. Prefixes: o_ offsets, m_ masks, b_ blocks in registers. Strides are
in elements; offsets computed from them are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def adapters_of(adapter_ids, o_row, stride_k, adapters, mask):
    """Returns the adapters of the rows, [BR]; negative: none. Without adapter_ids every row has adapter 0."""
    if adapter_ids is None:
        adapter = o_row * 0
    else:
        adapter = tl.load(adapter_ids + o_row.to(tl.int64) * stride_k, mask=mask, other=-1).to(tl.int32)
        adapter = tl.where(adapter < adapters, adapter, -1)
    return adapter


@triton.jit
def dropout_factors(seed, threshold, scale, o_row, o_slot, o_d):
    """Returns 0 or ``scale``, [BR, BD], drawn with the counters of ``ops/vector_dropout.py``."""
    zero = o_row[:, None] * 0 + o_d[None, :] * 0
    word, _, _, _ = tl.philox(tl.load(seed), zero + o_d[None, :], zero + o_slot[:, None], zero + o_row[:, None], zero)
    return tl.where(word >= threshold.to(tl.uint32, bitcast=True), scale, 0.0)


@triton.jit
def load_vectors(vectors, seed, threshold, scale, o_row, o_slot, b_adapter, o_d, vectors_per_adapter, d, mask):
    """Returns the vectors to add to the special tokens o_slot of the rows o_row, [BR, BD]."""
    o_vector = b_adapter.to(tl.int64) * vectors_per_adapter + tl.minimum(o_slot, vectors_per_adapter - 1)
    b_added = tl.load(vectors + o_vector[:, None] * d + o_d[None, :], mask=mask, other=0.0)
    if seed is not None:
        b_added *= dropout_factors(seed, threshold, scale, o_row, o_slot, o_d)
    return b_added


@triton.jit(
    do_not_specialize=[
        "length",
        "specials",
        "max_slots",
        "stride_ib",
        "stride_ij",
        "stride_s",
        "stride_mb",
        "stride_mj",
    ]
)
def special_token_slots_kernel(
    slots, counts, input_ids, special_ids, attention_mask,
    length, specials, max_slots, stride_ib, stride_ij, stride_s, stride_mb, stride_mj,
    BS: tl.constexpr,
):  # fmt: skip
    """Finds the special tokens of a row. Grid: rows of the batch.

    The row is read in blocks; the running count is the slot of the next special token.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.program_id(0) * 0
    for start in range(0, length, BS):
        o_s = start + tl.arange(0, BS)
        m_s = o_s < length
        b_id = tl.load(input_ids + row * stride_ib + o_s.to(tl.int64) * stride_ij, mask=m_s, other=0).to(tl.int64)
        m_special = o_s < 0
        for i in range(0, specials):
            m_special = m_special | (b_id == tl.load(special_ids + i * stride_s).to(tl.int64))
        m_special = m_special & m_s
        if attention_mask is not None:
            m_special = m_special & (
                tl.load(attention_mask + row * stride_mb + o_s.to(tl.int64) * stride_mj, mask=m_s, other=0) != 0
            )
        b_special = m_special.to(tl.int32)
        o_slot = count + tl.cumsum(b_special, 0) - 1
        tl.store(slots + row * max_slots + o_slot, o_s, mask=m_special & (o_slot < max_slots))
        count += tl.sum(b_special, 0)
    for start in range(count, max_slots, BS):
        o_slot = start + tl.arange(0, BS)
        tl.store(slots + row * max_slots + o_slot, o_slot * 0 - 1, mask=o_slot < max_slots)
    tl.store(counts + row, count)


@triton.jit(
    do_not_specialize=[
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
def special_token_add_kernel(
    hidden, vectors, slots, adapter_ids, seed,
    length, slots_per_row, adapters, vectors_per_adapter, d, threshold, scale,
    stride_hb, stride_hs, stride_hd, stride_sb, stride_sj, stride_k,
    BD: tl.constexpr,
):  # fmt: skip
    """Adds a tile of one vector in place. Grid: tiles of columns, then (B, k).

    A program whose slot is unused returns at once.
    """
    tiles = tl.cdiv(d, BD)
    o_row = tl.program_id(0) // tiles // slots_per_row + tl.arange(0, 1)
    o_slot = tl.program_id(0) // tiles % slots_per_row + tl.arange(0, 1)
    o_d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    b_position = tl.load(slots + o_row.to(tl.int64) * stride_sb + o_slot.to(tl.int64) * stride_sj).to(tl.int64)  # [1]
    b_position = tl.where(b_position < length, b_position, -1)
    b_adapter = adapters_of(adapter_ids, o_row, stride_k, adapters, o_row >= 0)
    if tl.max(tl.minimum(b_position, b_adapter.to(tl.int64)), 0) >= 0:
        mask = (o_d < d)[None, :]
        p = (
            hidden
            + o_row.to(tl.int64)[:, None] * stride_hb
            + b_position[:, None] * stride_hs
            + o_d.to(tl.int64)[None, :] * stride_hd
        )
        b_added = load_vectors(
            vectors, seed, threshold, scale, o_row, o_slot, b_adapter, o_d, vectors_per_adapter, d, mask
        )
        b_hidden = tl.load(p, mask=mask, other=0.0).to(tl.float32) + b_added  # [1, BD]
        tl.store(p, b_hidden.to(hidden.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "batch",
        "length",
        "rows",
        "slots_per_row",
        "adapters",
        "vectors_per_adapter",
        "threshold",
        "stride_sb",
        "stride_sj",
        "stride_k",
    ]
)
def special_token_add_bwd_kernel(
    partial, grad, slots, adapter_ids, seed,
    batch, length, rows, slots_per_row, adapters, vectors_per_adapter, d, threshold, scale,
    stride_gb, stride_gs, stride_sb, stride_sj, stride_k,
    BY_SLOT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums the gradient of one vector over ``rows`` rows of the batch, BN pairs of row and slot at a time, in order.

    Grid: tiles of columns, then (K, P), then parts of the batch. BY_SLOT: grad is (B, k, d), a row for every slot, in
    place of (B, S, d); ``length`` is S.
    """
    tiles = tl.cdiv(d, BD)
    o_d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    m_d = o_d < d
    item = (tl.program_id(0) // tiles).to(tl.int64)
    adapter = (item % (adapters * vectors_per_adapter) // vectors_per_adapter).to(tl.int32)
    vector = (item % vectors_per_adapter).to(tl.int32)
    begin = (item // (adapters * vectors_per_adapter)).to(tl.int32) * rows
    # The last vector also serves all later slots.
    taken = tl.where(vector == vectors_per_adapter - 1, slots_per_row - vector, tl.minimum(slots_per_row - vector, 1))
    addends = (tl.minimum(begin + rows, batch) - begin) * tl.maximum(taken, 0)
    b_sum = tl.zeros([BN, BD], tl.float32)
    for start in range(0, addends, BN):
        o_n = start + tl.arange(0, BN)
        o_row, o_slot = begin + o_n // taken, vector + o_n % taken
        m_n = o_n < addends
        # [BN]
        b_position = tl.load(
            slots + o_row.to(tl.int64) * stride_sb + o_slot.to(tl.int64) * stride_sj, mask=m_n, other=-1
        )
        m_n = m_n & (b_position >= 0) & (b_position < length)
        m_n = m_n & (adapters_of(adapter_ids, o_row, stride_k, adapters, m_n) == adapter)
        if BY_SLOT:
            b_token = o_slot.to(tl.int64)
        else:
            b_token = b_position.to(tl.int64)
        p = grad + (o_row.to(tl.int64) * stride_gb + b_token * stride_gs)[:, None] + o_d[None, :]
        b_grad = tl.load(p, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [BN, BD]
        if seed is not None:
            b_grad *= dropout_factors(seed, threshold, scale, o_row, o_slot, o_d)
        b_sum += b_grad
    tl.store(partial + item * d + o_d, tl.sum(b_sum, 0), mask=m_d)
