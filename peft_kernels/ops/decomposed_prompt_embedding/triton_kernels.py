"""Triton kernels. Every element of a result is written by one program.

Prefixes: o_ offsets, m_ masks, b_ blocks in registers. A token of a row has the position token - offset; the tokens
before the offset take the remaining positions at the end, so tokens and positions map one to one. An adapter out of
range counts as none, an id as the last one, an offset as the length.
"""

import triton
import triton.language as tl


@triton.jit
def _integer_or_zero(p, i, stride):
    if p is None:
        x = (i * 0).to(tl.int32)
    else:
        x = tl.load(p + i * stride).to(tl.int32)
    return x


@triton.jit
def _adapter_of(adapter_ids, row, stride_k, adapters):
    adapter = _integer_or_zero(adapter_ids, row, stride_k)
    return tl.where(adapter < adapters, adapter, -1)


@triton.jit
def _load_rows(matrix, adapter, rows, d, o_row, o_d, mask):
    """Loads rows o_row of matrix[adapter], (K, rows, d) in memory; adapter -1 reads adapter 0."""
    p = matrix + tl.maximum(adapter, 0).to(tl.int64) * rows * d
    return tl.load(p + o_row[:, None] * d + o_d[None, :], mask=mask, other=0.0)  # [BP, BD]


@triton.jit
def _product(
    a, b, adapter, positions, rank, d, o_row, o_d, m_row, m_d, scale, BR: tl.constexpr, PRECISION: tl.constexpr
):
    """Returns scale * a[adapter][o_row] @ b[adapter][:, o_d], [BP, BD]."""
    adapter = tl.maximum(adapter, 0).to(tl.int64)
    o_r = tl.arange(0, BR)
    p_a = a + adapter * positions * rank + o_row[:, None] * rank + o_r[None, :]  # [BP, BR]
    p_b = b + adapter * rank * d + o_r.to(tl.int64)[:, None] * d + o_d[None, :]  # [BR, BD]
    b_sum = tl.zeros([o_row.shape[0], o_d.shape[0]], tl.float32)
    for start in range(0, rank, BR):
        m_r = o_r < rank - start
        b_a = tl.load(p_a, mask=m_row[:, None] & m_r[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_r[:, None] & m_d[None, :], other=0.0)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
        p_a += BR
        p_b += BR * d
    return b_sum * scale


@triton.jit
def _last_if_out_of_range(x, last):
    return tl.minimum(x.to(tl.uint32, bitcast=True), last.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)


@triton.jit
def _load_ids(input_ids, offsets, row, stride_ib, stride_il, stride_o, length, vocabulary, o_row, m_row):
    """Returns, for a row of the batch, its offset, the tokens at the positions o_row, and their ids, [BP]."""
    offset = _last_if_out_of_range(_integer_or_zero(offsets, row, stride_o), length)
    o_token = o_row + offset
    o_token = tl.where(o_token < length, o_token, o_token - length)
    b_id = tl.load(input_ids + row * stride_ib + o_token.to(tl.int64) * stride_il, mask=m_row, other=0)
    return offset, o_token, _last_if_out_of_range(b_id.to(tl.int32), vocabulary - 1)


@triton.jit(
    do_not_specialize=[
        "batch",
        "length",
        "virtual",
        "positions",
        "rank",
        "rows",
        "vocabulary",
        "adapters",
        "stride_ib",
        "stride_il",
        "stride_o",
        "stride_k",
    ]
)
def decomposed_prompt_embedding_fwd_kernel(
    out, input_ids, weight, prompt, a, b, delta, offsets, adapter_ids,
    batch, length, virtual, positions, rank, d, rows, vocabulary, adapters, scale, embed_scale,
    stride_ib, stride_il, stride_w, stride_o, stride_k,
    FIRST: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes a tile of the prompt or of the embedded tokens for ``rows`` rows of the batch.

    Grid: tiles of columns, then of prompt rows and of positions, then groups of rows of the batch. A program keeps its
    tile of the prompt or of the low-rank update in registers while the adapter of its rows stays the same.
    """
    column_tiles = tl.cdiv(d, BD)
    prompt_tiles = tl.cdiv(virtual, BP)
    tiles = prompt_tiles + tl.cdiv(length, BP)
    tile = tl.program_id(0) // column_tiles % tiles
    begin = tl.program_id(0) // column_tiles // tiles * rows
    end = tl.minimum(begin + rows, batch)
    row = begin.to(tl.int64)
    o_d = tl.program_id(0) % column_tiles * BD + tl.arange(0, BD)
    m_d = o_d < d
    b_update = tl.zeros([BP, BD], tl.float32)
    current = begin * 0 - 1  # the adapter of b_update
    if tile < prompt_tiles:
        o_row = tile * BP + tl.arange(0, BP)
        m_out = (o_row < virtual)[:, None] & m_d[None, :]  # [BP, BD]
        o_out = (FIRST + o_row).to(tl.int64)[:, None] * d + o_d[None, :]
        for _ in range(begin, end):
            adapter = _adapter_of(adapter_ids, row, stride_k, adapters)
            if adapter != current:
                b_update = _load_rows(prompt, adapter, virtual, d, o_row, o_d, m_out)
                b_update = tl.where(adapter >= 0, b_update, 0.0)
            current = adapter
            tl.store(out + row * (virtual + length) * d + o_out, b_update.to(out.dtype.element_ty), mask=m_out)
            row += 1
    else:
        o_row = (tile - prompt_tiles) * BP + tl.arange(0, BP)
        m_row = o_row < length
        m_out = m_row[:, None] & m_d[None, :]  # [BP, BD]
        offset, o_token, b_id = _load_ids(
            input_ids, offsets, row, stride_ib, stride_il, stride_o, length, vocabulary, o_row, m_row
        )
        for _ in range(begin, end):
            # [BP, BD]
            b_x = tl.load(weight + (b_id.to(tl.int64) * stride_w)[:, None] + o_d[None, :], mask=m_out, other=0.0)
            m_update = o_token >= offset
            o_column = tl.where(o_token < FIRST, o_token, o_token + virtual)
            # The ids of the next row are loaded while this row is written.
            next_row = tl.minimum(row + 1, end - 1)
            offset, o_token, b_id = _load_ids(
                input_ids, offsets, next_row, stride_ib, stride_il, stride_o, length, vocabulary, o_row, m_row
            )
            adapter = _adapter_of(adapter_ids, row, stride_k, adapters)
            if adapter != current:
                if delta is None:
                    b_update = _product(a, b, adapter, positions, rank, d, o_row, o_d, m_row, m_d, scale, BR, PRECISION)
                else:
                    b_update = _load_rows(delta, adapter, positions, d, o_row, o_d, m_out)
                b_update = tl.where(adapter >= 0, b_update, 0.0)
            current = adapter
            b_out = b_x.to(tl.float32) * embed_scale + tl.where(m_update[:, None], b_update, 0.0)
            p_out = out + row * (virtual + length) * d + o_column.to(tl.int64)[:, None] * d + o_d[None, :]
            tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_out)
            row += 1


@triton.jit(do_not_specialize=["batch", "length", "virtual", "prompt_rows", "delta_rows", "stride_o", "stride_k"])
def decomposed_prompt_embedding_bwd_kernel(
    grad, grad_prompt, grad_delta, offsets, adapter_ids,
    batch, length, virtual, prompt_rows, delta_rows, d,
    stride_gb, stride_gl, stride_o, stride_k,
    FIRST: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums one row of a gradient over the batch, BN rows at a time, in order.

    Grid: tiles of columns, then rows of (K, prompt_rows + delta_rows).
    """
    column_tiles = tl.cdiv(d, BD)
    row = tl.program_id(0) // column_tiles
    adapter = row // (prompt_rows + delta_rows)
    position = row % (prompt_rows + delta_rows) - prompt_rows
    o_d = tl.program_id(0) % column_tiles * BD + tl.arange(0, BD)
    m_d = o_d < d
    b_sum = tl.zeros([BN, BD], tl.float32)
    for start in range(0, batch, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < batch
        if adapter_ids is not None:
            b_adapter = tl.load(adapter_ids + o_n.to(tl.int64) * stride_k, mask=m_n, other=-1)  # [BN]
            m_n = m_n & (b_adapter == adapter)
        b_token = o_n * 0 + position
        if offsets is not None:
            b_offset = tl.load(offsets + o_n.to(tl.int64) * stride_o, mask=m_n, other=0).to(tl.int32)
            b_token += _last_if_out_of_range(b_offset, length)
        b_column = tl.where(b_token < FIRST, b_token, b_token + virtual)
        b_column = tl.where(o_n * 0 + position < 0, FIRST + position + prompt_rows, b_column)
        m_n = m_n & ((b_token < length) | (o_n * 0 + position < 0))
        p = grad + o_n.to(tl.int64)[:, None] * stride_gb + b_column.to(tl.int64)[:, None] * stride_gl + o_d[None, :]
        b_sum += tl.load(p, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [BN, BD]
    b_sum = tl.sum(b_sum, 0)  # [BD]
    if position < 0:
        tl.store(grad_prompt + (adapter.to(tl.int64) * prompt_rows + position + prompt_rows) * d + o_d, b_sum, mask=m_d)
    else:
        tl.store(grad_delta + (adapter.to(tl.int64) * delta_rows + position) * d + o_d, b_sum, mask=m_d)
