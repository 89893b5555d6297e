"""Mapping of programs to rows and keys, and loads of tiles: shared by the forward and backward kernels.

A row is one token of one stream: (stream, token) is folded into stream * tokens + token, so the rows of an input are
adjacent and one tile of rows spans many streams. Prefixes: o_ offsets, m_ masks, b_ blocks in registers.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rows_of_input(cu_streams, tokens, rows_per_input, i):
    """Returns the first row of input i and its number of rows."""
    if cu_streams is None:
        first = i.to(tl.int64) * rows_per_input
        rows = rows_per_input
    else:
        first = tl.load(cu_streams + i).to(tl.int64) * tokens
        rows = (tl.load(cu_streams + i + 1).to(tl.int64) * tokens - first).to(tl.int32)
    return first, rows


@triton.jit
def tile_of_rows(cu_streams, tokens, rows_per_input, inputs, program, BM: tl.constexpr):
    """Returns the input of a program, the first row of its tile and the number of rows in it; the tile is empty if that
    is not positive.

    Ragged streams: the tiles of input i start at program first_row(i) // BM + i. The start is monotone and gives every
    input at least the programs it needs, so a program finds its input by bisection, without a table per tile or a
    synchronization.
    """
    if cu_streams is None:
        tiles = tl.cdiv(rows_per_input, BM)
        i = program // tiles
        tile = program % tiles
    else:
        i = program * 0
        above = i + inputs
        while above - i > 1:
            middle = (i + above) // 2
            here = tl.load(cu_streams + middle).to(tl.int64) * tokens // BM + middle <= program
            i = tl.where(here, middle, i)
            above = tl.where(here, above, middle)
        tile = program - (tl.load(cu_streams + i).to(tl.int64) * tokens // BM + i).to(tl.int32)
    first, rows = rows_of_input(cu_streams, tokens, rows_per_input, i)
    return i, first + tile * BM, tl.minimum(rows - tile * BM, BM)


@triton.jit
def length_of_input(key_lengths, n, i):
    if key_lengths is None:
        length = n
    else:
        length = tl.minimum(tl.maximum(tl.load(key_lengths + i).to(tl.int32), 0), n)
    return length


@triton.jit
def load_tile(p_rows, m_rows, first, D: tl.constexpr, WIDTH: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Loads [rows, WIDTH] from column ``first`` of the rows at ``p_rows``; 0 where masked, since padding may hold
    anything.
    """
    o_d = first + tl.arange(0, WIDTH)
    p = p_rows[:, None] + o_d[None, :]
    if MASK_ROWS and D % WIDTH != 0:
        b = tl.load(p, mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)
    elif MASK_ROWS:
        b = tl.load(p, mask=m_rows[:, None], other=0.0)
    elif D % WIDTH != 0:
        b = tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    else:
        b = tl.load(p)
    return b


@triton.jit
def dot_over_d(
    b_x, p_x, m_x, b_y, p_y, m_y, D: tl.constexpr, BLOCK_D: tl.constexpr, BK: tl.constexpr, MASK_Y: tl.constexpr
):  # fmt: skip
    """Returns ``x @ y.T``, [rows of x, rows of y], of two tiles that are passed both as blocks and as pointers.

    Without tensor cores, which NVIDIA does not have for float32, a thread would keep all columns of its rows in
    registers, and spill. Then the columns are read again, BK at a time.
    """
    if BK == BLOCK_D:
        b_s = tl.dot(b_x, tl.trans(b_y), input_precision="ieee")
    else:
        b_s = tl.zeros([p_x.shape[0], p_y.shape[0]], tl.float32)
        for first in range(0, D, BK):
            b_xk = load_tile(p_x, m_x, first, D, BK, True)  # [rows of x, BK]
            b_yk = load_tile(p_y, m_y, first, D, BK, MASK_Y)
            b_s = tl.dot(b_xk, tl.trans(b_yk), b_s, input_precision="ieee")
    return b_s
