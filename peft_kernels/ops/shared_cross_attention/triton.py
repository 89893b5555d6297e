"""Launchers and default configs of the Triton kernels, which fold the rows of all streams of an input into tiles.

Many streams thus read the keys and values of their input once. Rows are addressed by one stride, as in a (streams,
tokens, heads, D) layout. A query or gradient in another layout is copied first; so are a key or value whose D is not
contiguous, and lengths or indices with a stride other than 1. No launch synchronizes with the device or depends on a
value there.
"""

from functools import cache, lru_cache
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
SPLIT_KEYS = 64  # a split has at least so many keys
FULL = 0.8  # the share of the SMs from which keys are not split
NEAR_BEST = 0.85  # of the best share of busy SMs, from which fewer splits are taken: each costs the merge time
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


class Plan(NamedTuple):
    """What a forward launch needs to know and shapes alone decide."""

    copied: tuple[bool, bool, bool]  # whether query, key and value are copied to another layout
    default: dict[str, int]  # config
    key: tuple[int, ...]  # of its row in the table of tuned configs
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@lru_cache(maxsize=1024)
def plan(shape, strides, key_shape, key_strides, value_strides, size: int, family: str) -> Plan:
    """Returns the plan of a forward launch. A copied tensor is token-major, so its strides are known."""
    (streams, heads, tokens, head_dim), (inputs, _, n, _) = shape, key_shape
    copied = not _folds(shape, strides), not _loads(key_strides), not _loads(value_strides)

    def token_major_strides(tokens):
        return tokens * heads * head_dim, head_dim, heads * head_dim, 1

    strides = token_major_strides(tokens) if copied[0] else strides
    key_strides, value_strides = (
        token_major_strides(n) if copy else x for copy, x in zip(copied[1:], (key_strides, value_strides))
    )
    rows = streams * tokens
    configs = configs_of(family, size, head_dim)
    config = next((c for c in configs.forward if c.rows * inputs >= rows), configs.forward[-1])
    return Plan(
        copied,
        launch_options(config, family, size, head_dim),
        (size, table_d(head_dim), config.rows),
        (tokens, rows // inputs, rows, inputs, n),
        (*_row_strides_of(shape, strides), *key_strides[:3], *value_strides[:3]),
    )


def forward(
    query, key, value, key_lengths, encoder_index, scale, need_lse=True, cu_streams=None
) -> tuple[Tensor, Tensor | None]:
    streams, heads, tokens, head_dim = query.shape
    out = token_major(streams, heads, tokens, head_dim, like=query)
    lse = token_major(streams, heads, tokens, like=query, dtype=torch.float32) if need_lse else None
    if not query.numel():
        return out, lse
    if scale < 0:  # the kernel takes the maximum score before it scales
        query, scale = -query, -scale
    device = query.device
    family, sms = device_of(device)
    copied, default, row, sizes, strides = plan(
        query.shape, query.stride(), key.shape, key.stride(), value.stride(), query.element_size(), family
    )
    if any(copied):
        query, key, value = (as_token_major(x) if copy else x for copy, x in zip(copied, (query, key, value)))
    if key_lengths is not None:
        (key_lengths,) = contiguous(key_lengths)
    _, _, rows, inputs, n = sizes
    options = tuned.options("shared_cross_attention", "forward", device, default, *row)
    with guard(device):
        cu_streams = _cu_streams(encoder_index, cu_streams, inputs)
        tiles = _tiles(options["BM"], rows, inputs, cu_streams)
        splits = num_splits(tiles * heads, n, sms)
        part_out, part_lse = out, lse
        if splits > 1:
            part_out = torch.empty((splits, rows, heads, head_dim), dtype=torch.float32, device=query.device)
            part_lse = torch.empty((splits, rows, heads), dtype=torch.float32, device=query.device)
        triton_forward.shared_cross_attention_fwd_kernel[tiles, heads, splits](
            query, key, value, part_out, part_lse, key_lengths, cu_streams, *sizes, scale, *strides, **options
        )  # fmt: skip
        if splits > 1:
            triton_forward.shared_cross_attention_fwd_merge_kernel[cdiv(rows * heads, ROW_HEADS),](
                part_out, part_lse, out, lse, rows * heads, splits,
                **row_options(head_dim),
            )  # fmt: skip
    return out, lse


def backward(
    grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, need_query, need_key,
    need_value, cu_streams=None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
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
    (key_lengths,) = contiguous(key_lengths)
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
        cu_streams = _cu_streams(encoder_index, cu_streams, inputs)
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


@cache
def num_splits(programs: int, n: int, sms: int) -> int:
    """Returns the number of key ranges per tile: the fewest with which the waves of programs keep nearly as many SMs
    busy as with the best number. FlashAttention 2 splits by the same rule.
    """
    if programs >= FULL * sms:
        return 1

    def busy(splits):
        return programs * splits / sms / cdiv(programs * splits, sms)

    numbers = range(1, max(1, min(n // SPLIT_KEYS, MAX_SPLITS)) + 1)
    best = max(map(busy, numbers))
    return next(splits for splits in numbers if busy(splits) >= NEAR_BEST * best)


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


def _folds(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Returns whether one stride leads from each (stream, token) row to the next."""
    streams, _, tokens, _ = shape
    rows = tokens == 1 or streams == 1 or strides[0] == tokens * strides[2]
    return strides[3] == 1 and rows and _row_strides_of(shape, strides)[0] < MAX_STRIDE


def _rows(x: Tensor) -> Tensor:
    return x if _folds(x.shape, x.stride()) else as_token_major(x)


def _row_strides(x: Tensor) -> tuple[int, int]:
    return _row_strides_of(x.shape, x.stride())


def _row_strides_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int]:
    """Returns the strides of (stream, token) rows and of heads."""
    return strides[0 if shape[2] == 1 else 2], strides[1]


def _loads(strides: tuple[int, ...]) -> bool:
    return strides[3] == 1 and strides[2] < MAX_STRIDE


def _keys(x: Tensor) -> Tensor:
    return x if _loads(x.stride()) else as_token_major(x)


def _cu_streams(encoder_index: Tensor | None, cu_streams: Tensor | None, inputs: int) -> Tensor | None:
    """Returns the first stream of each input, (b + 1,), int64; None if every input has the same number of streams."""
    if encoder_index is None:
        return None
    if cu_streams is not None:
        return cu_streams.to(torch.int64).contiguous()
    values = torch.arange(inputs + 1, dtype=encoder_index.dtype, device=encoder_index.device)
    return torch.searchsorted(encoder_index.contiguous(), values)


def _tiles(block: int, rows: int, inputs: int, cu_streams: Tensor | None) -> int:
    return inputs * cdiv(rows // inputs, block) if cu_streams is None else rows // block + inputs
