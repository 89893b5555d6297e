"""Launchers and default configs of the Triton kernels, which fold the rows of all streams of an input into tiles.

Many streams thus read the keys and values of their input once. Rows are addressed by one stride, as in a (streams,
tokens, heads, D) layout. A query or gradient in another layout is copied first; so are a key or value whose D is not
contiguous, and lengths or indices with a stride other than 1. No launch synchronizes with the device or depends on a
value there.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tuned
from ..triton_runtime import cdiv, contiguous, device_of, guard, kernel_module, unavailable
from .layout import as_token_major, token_major

triton_forward, triton_backward = (kernel_module(__package__, name) for name in ("triton_forward", "triton_backward"))

__all__ = ["backward", "forward", "unavailable"]

MAX_STRIDE = (1 << 31) // 128  # limit for rows and keys: offsets inside a tile are int32
MAX_SPLITS = 64
SPLIT_KEYS = 256  # a split of fewer keys costs more in the merge than it saves
FMA_DEPTH = 16  # columns at a time without tensor cores
ROW_HEADS = 16  # (row, head) pairs per program in kernels without a matmul


class Config(NamedTuple):
    """Rows and keys per block."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    """The configs of one head width.

    ``forward`` is in ascending order of rows: the launcher takes the first that holds the rows of a mean input, else
    the last. With ``apart`` the gradients of keys and of values are computed one after the other, since together they
    do not fit in registers.
    """

    forward: tuple[Config, ...]
    query_grad: Config
    key_value_grad: Config
    apart: bool = False


# (family, bytes per element, BLOCK_D; 64 also for less). `make test-kernels` compiles every row without a GPU:
# no spills, tensor cores of the family, shared memory that fits. sm_80 also serves the families without rows, whose
# shared memory may be smaller: it stays below 99 KiB.
C = Config
CONFIGS = {
    ("sm_80", 2, 64): Configs(
        (C(16, 64, 4, 3), C(32, 64, 4, 3), C(64, 64, 4, 2), C(128, 64, 8, 2)), C(64, 32, 4, 2), C(32, 64, 4, 2)
    ),
    ("sm_80", 2, 128): Configs(
        (C(16, 64, 4, 3), C(32, 64, 8, 2), C(64, 32, 4, 2), C(128, 32, 8, 3)), C(64, 32, 8, 2), C(32, 64, 8, 2)
    ),
    ("sm_80", 2, 256): Configs((C(16, 32, 4, 3), C(32, 32, 4, 2), C(64, 32, 8, 2)), C(64, 16, 8, 2), C(16, 64, 8, 2)),
    ("sm_80", 4, 64): Configs((C(16, 32, 8, 2), C(32, 32, 4, 2)), C(32, 16, 4, 2), C(16, 32, 8, 2)),
    ("sm_80", 4, 128): Configs((C(16, 32, 8, 2), C(32, 32, 4, 2)), C(32, 16, 8, 2), C(16, 32, 8, 2)),
    ("sm_80", 4, 256): Configs((C(16, 32, 8, 2), C(32, 32, 8, 2)), C(32, 16, 8, 2), C(16, 16, 8, 2)),
    ("sm_90", 2, 64): Configs(
        (C(16, 64, 4, 3), C(32, 64, 4, 3), C(64, 64, 4, 3), C(128, 64, 8, 3)), C(64, 64, 4, 2), C(64, 128, 8, 2)
    ),
    ("sm_90", 2, 128): Configs(
        (C(16, 64, 4, 3), C(32, 64, 4, 3), C(64, 64, 4, 2), C(128, 64, 8, 3)), C(128, 64, 8, 2), C(32, 128, 8, 2)
    ),
    ("sm_90", 2, 256): Configs(
        (C(16, 32, 4, 3), C(32, 32, 4, 2), C(64, 64, 8, 2), C(128, 32, 8, 2)),
        C(64, 32, 8, 2),
        C(32, 64, 8, 2),
        apart=True,
    ),
    ("sm_90", 4, 64): Configs((C(16, 32, 4, 2), C(32, 32, 4, 2)), C(32, 16, 8, 2), C(16, 32, 8, 2)),
    ("sm_90", 4, 128): Configs((C(16, 32, 8, 2), C(32, 32, 4, 2)), C(32, 16, 8, 2), C(16, 32, 8, 2)),
    ("sm_90", 4, 256): Configs((C(16, 32, 8, 2), C(32, 32, 8, 2)), C(32, 16, 8, 2), C(16, 16, 8, 2)),
    ("sm_100", 2, 64): Configs(
        (C(16, 64, 4, 3), C(32, 64, 4, 3), C(64, 64, 4, 3), C(128, 64, 8, 3)), C(64, 64, 4, 2), C(32, 128, 8, 2)
    ),
    ("sm_100", 2, 128): Configs(
        (C(16, 64, 4, 3), C(32, 64, 4, 3), C(64, 32, 4, 3), C(128, 64, 8, 3)), C(128, 64, 8, 2), C(32, 128, 8, 2)
    ),
    ("sm_100", 2, 256): Configs(
        (C(16, 32, 4, 3), C(32, 16, 8, 2), C(64, 64, 8, 2), C(128, 32, 8, 2)), C(64, 32, 8, 2), C(32, 64, 8, 2)
    ),
    ("sm_100", 4, 64): Configs((C(16, 32, 8, 2), C(32, 32, 4, 2)), C(32, 16, 8, 2), C(16, 32, 8, 2)),
    ("sm_100", 4, 128): Configs((C(16, 32, 8, 2), C(32, 32, 4, 2)), C(32, 16, 8, 2), C(16, 32, 8, 2)),
    ("sm_100", 4, 256): Configs((C(16, 32, 8, 2), C(32, 32, 8, 2)), C(32, 16, 8, 2), C(16, 16, 8, 2)),
    ("gfx942", 2, 64): Configs(
        (C(16, 64, 4, 2), C(32, 64, 4, 2), C(64, 64, 4, 2), C(128, 64, 4, 2)), C(64, 32, 4, 2), C(32, 64, 4, 2)
    ),
    ("gfx942", 2, 128): Configs(
        (C(16, 64, 4, 2), C(32, 64, 4, 2), C(64, 64, 4, 2), C(128, 64, 4, 2)), C(64, 32, 4, 2), C(32, 64, 4, 2)
    ),
    ("gfx942", 2, 256): Configs((C(16, 32, 4, 2), C(64, 32, 4, 2)), C(64, 16, 4, 2), C(16, 64, 4, 2)),
    ("gfx942", 4, 64): Configs((C(16, 32, 4, 2), C(64, 32, 4, 2)), C(64, 16, 4, 2), C(16, 64, 4, 2)),
    ("gfx942", 4, 128): Configs((C(16, 32, 4, 2), C(64, 32, 4, 2)), C(64, 16, 4, 2), C(16, 64, 4, 2)),
    ("gfx942", 4, 256): Configs((C(16, 16, 4, 2), C(32, 16, 4, 2)), C(16, 16, 4, 2), C(16, 32, 4, 2)),
}


def forward(query, key, value, key_lengths, encoder_index, scale, need_lse=True) -> tuple[Tensor, Tensor | None]:
    streams, heads, tokens, head_dim = query.shape
    inputs, n = key.shape[0], key.shape[2]
    out = token_major(*query.shape, like=query)
    lse = token_major(streams, heads, tokens, like=query, dtype=torch.float32) if need_lse else None
    if not query.numel():
        return out, lse
    if scale < 0:  # the kernel takes the maximum score before it scales
        query, scale = -query, -scale
    query, key, value = _rows(query), _keys(key), _keys(value)
    key_lengths, encoder_index = contiguous(key_lengths, encoder_index)
    rows = streams * tokens
    family, processors = device_of(query.device)
    configs = configs_of(family, query.element_size(), head_dim)
    config = next((c for c in configs.forward if c.rows * inputs >= rows), configs.forward[-1])
    options = _tuned("forward", config, query, config.rows)
    with guard(query.device):
        cu_streams = _cu_streams(encoder_index, inputs)
        tiles = _tiles(options["BM"], rows, inputs, cu_streams)
        splits = num_splits(tiles * heads, n, processors)
        part_out, part_lse = out, lse
        if splits > 1:
            part_out = torch.empty((splits, rows, heads, head_dim), dtype=torch.float32, device=query.device)
            part_lse = torch.empty((splits, rows, heads), dtype=torch.float32, device=query.device)
        triton_forward.shared_cross_attention_fwd_kernel[tiles, heads, splits](
            query, key, value, part_out, part_lse, key_lengths, cu_streams,
            tokens, rows // inputs, rows, inputs, n, scale,
            *_row_strides(query), *key.stride()[:3], *value.stride()[:3],
            **options,
        )  # fmt: skip
        if splits > 1:
            triton_forward.shared_cross_attention_fwd_merge_kernel[cdiv(rows * heads, ROW_HEADS),](
                part_out, part_lse, out, lse, rows * heads, splits,
                **row_options(head_dim),
            )  # fmt: skip
    return out, lse


def backward(
    grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, need_query, need_key, need_value
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _, heads, tokens, head_dim = query.shape
    inputs, n = key.shape[0], key.shape[2]
    grad_query, grad_key, grad_value = (
        token_major(*x.shape, like=x) if needed else None
        for x, needed in ((query, need_query), (key, need_key), (value, need_value))
    )
    query, grad_out, out, key, value, lse = (
        _rows(query),
        _rows(grad_out),
        _rows(out),
        _keys(key),
        _keys(value),
        as_token_major(lse),
    )
    key_lengths, encoder_index = contiguous(key_lengths, encoder_index)
    rows = query.shape[0] * tokens
    family, _ = device_of(query.device)
    configs = configs_of(family, query.element_size(), head_dim)
    strides = *_row_strides(query), *key.stride()[:3], *value.stride()[:3], *_row_strides(grad_out)
    with guard(query.device):
        delta = torch.empty((rows, heads), dtype=torch.float32, device=query.device) if need_query or need_key else None
        if delta is not None and delta.numel():
            triton_backward.shared_cross_attention_bwd_delta_kernel[cdiv(rows * heads, ROW_HEADS),](
                grad_out, out, grad_lse, delta, rows * heads, tokens, heads,
                *_row_strides(grad_out), *_row_strides(out), *((0, 0, 0) if grad_lse is None else grad_lse.stride()),
                **row_options(head_dim),
            )  # fmt: skip
        cu_streams = _cu_streams(encoder_index, inputs)
        if rows * heads and need_query:
            options = _tuned("query_grad", configs.query_grad, query)
            tiles = _tiles(options["BM"], rows, inputs, cu_streams)
            triton_backward.shared_cross_attention_bwd_query_kernel[tiles, heads](
                query, key, value, grad_out, lse, delta, grad_query, key_lengths, cu_streams,
                tokens, rows // inputs, inputs, n, scale, *strides,
                **options,
            )  # fmt: skip
        if key.numel() and (need_key or need_value):
            options = _tuned("key_value_grad", configs.key_value_grad, query)
            for grads in ((grad_key, None), (None, grad_value)) if configs.apart else ((grad_key, grad_value),):
                if any(grad is not None for grad in grads):
                    triton_backward.shared_cross_attention_bwd_key_value_kernel[inputs * cdiv(n, options["BN"]), heads](
                        query, key, value, grad_out, lse, delta, *grads, key_lengths, cu_streams,
                        tokens, rows // inputs, n, scale, *strides,
                        **options,
                    )  # fmt: skip
    return grad_query, grad_key, grad_value


def num_splits(programs: int, n: int, processors: int) -> int:
    """Returns the number of key ranges per tile, so that every SM runs two programs."""
    return max(1, min(2 * processors // programs, n // SPLIT_KEYS, MAX_SPLITS))


def block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def configs_of(family: str, size: int, head_dim: int) -> Configs:
    return CONFIGS[family, size, table_d(head_dim)]


def table_d(head_dim: int) -> int:
    return max(64, block_d(head_dim))


@cache
def launch_options(config: Config, family: str, size: int, head_dim: int) -> dict[str, int]:
    """Returns the constants and options of a kernel with blocks of rows and keys."""
    depth = FMA_DEPTH if size == 4 and family.startswith("sm") else block_d(head_dim)
    blocks = {
        "D": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BM": config.rows,
        "BN": config.keys,
        "BK": min(depth, block_d(head_dim)),
    }
    return {**blocks, "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def _tuned(kernel: str, config: Config, query: Tensor, *bucket: int) -> dict[str, int]:
    size, head_dim = query.element_size(), query.shape[3]
    shipped = launch_options(config, device_of(query.device)[0], size, head_dim)
    return tuned.options("shared_cross_attention", kernel, query.device, shipped, size, table_d(head_dim), *bucket)


def row_options(head_dim: int) -> dict[str, int]:
    """Returns the constants and options of the kernels without a matmul."""
    return {
        "D": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BR": ROW_HEADS,
        "num_warps": 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def _rows(x: Tensor) -> Tensor:
    streams, _, tokens, _ = x.shape
    s = x.stride()
    folds = s[3] == 1 and (tokens == 1 or streams == 1 or s[0] == tokens * s[2]) and _row_strides(x)[0] < MAX_STRIDE
    return x if folds else as_token_major(x)


def _row_strides(x: Tensor) -> tuple[int, int]:
    """Returns the strides of (stream, token) rows and of heads."""
    return x.stride(0 if x.shape[2] == 1 else 2), x.stride(1)


def _keys(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 and x.stride(2) < MAX_STRIDE else as_token_major(x)


def _cu_streams(encoder_index: Tensor | None, inputs: int) -> Tensor | None:
    """Returns the first stream of each input, (b + 1,); None if every input has the same number of streams."""
    if encoder_index is None:
        return None
    return torch.searchsorted(
        encoder_index, torch.arange(inputs + 1, dtype=encoder_index.dtype, device=encoder_index.device), out_int32=True
    )


def _tiles(block: int, rows: int, inputs: int, cu_streams: Tensor | None) -> int:
    return inputs * cdiv(rows // inputs, block) if cu_streams is None else rows // block + inputs
