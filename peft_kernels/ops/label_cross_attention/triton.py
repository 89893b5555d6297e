"""Launchers and default configs of the Triton kernels. No launch synchronizes with the device or depends on a value
there.

The scores of all tokens go through memory once, in float32. Backward needs them as weights, and they are small compared
with the features, which would not fit in registers until the softmax is known.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tuned
from ..triton_runtime import (
    COMPILER_OPTIONS,
    cdiv,
    contiguous,
    dense,
    device_of,
    guard,
    kernel_module,
    partition,
    unavailable,
)

triton_kernels = kernel_module(__package__)

__all__ = ["pool", "pool_backward", "unavailable"]


class Config(NamedTuple):
    """The tall side of a block, tokens in scores and columns in pool, and the depth of one step of its matmul."""

    tall: int
    depth: int
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    scores: Config
    pool: Config


# (matrix unit, queries per block): the launcher takes the smallest block that holds all queries, so that features are
# read once, else the largest. "fma": float32 on NVIDIA, where a thread keeps whole rows and columns of the depth in
# registers. `make test-kernels` compiles every row for its architectures, without a GPU: no spills, tensor cores, and
# shared memory below the 99 KiB of small chips.
C = Config
CONFIGS = {
    ("half", 16): Configs(C(128, 64, 4, 3), C(128, 32, 4, 3)),
    ("half", 32): Configs(C(128, 64, 4, 3), C(128, 32, 4, 3)),
    ("half", 64): Configs(C(128, 64, 8, 3), C(128, 64, 8, 2)),
    ("half", 128): Configs(C(64, 64, 4, 3), C(128, 32, 8, 2)),
    ("fma", 16): Configs(C(64, 16, 4, 2), C(128, 16, 4, 2)),
    ("fma", 32): Configs(C(64, 16, 8, 2), C(64, 16, 4, 2)),
    ("fma", 64): Configs(C(64, 16, 8, 2), C(64, 16, 8, 2)),
    ("amd", 16): Configs(C(64, 64, 4, 2), C(64, 64, 4, 2)),
    ("amd", 32): Configs(C(64, 64, 4, 2), C(64, 64, 4, 2)),
    ("amd", 64): Configs(C(64, 32, 4, 2), C(64, 32, 4, 2)),
}
SOFTMAX = {"BN": 128, "BQ": 8, "num_warps": 4, **COMPILER_OPTIONS}


def pool(queries, features, lengths, offsets, scale, keep) -> tuple[Tensor, Tensor | None]:
    heads, _, slots, width = queries.shape
    features, batch = dense(features), len(features) if offsets is None else len(offsets) - 1
    lengths, offsets = contiguous(lengths, offsets)
    pooled = queries.new_empty(heads, batch, slots, width)
    weights = queries.new_empty(*features.shape[:-1], heads * slots, dtype=torch.float32)
    if pooled.numel():
        with guard(features.device):
            if weights.numel():
                _scores(weights, queries, features, lengths, offsets, batch)
                options = tuned.options("label_cross_attention", "softmax", weights.device, SOFTMAX)
                triton_kernels.label_cross_attention_softmax_kernel[cdiv(heads * slots, options["BQ"]) * batch,](
                    weights, lengths, offsets, features.shape[-2], heads * slots, scale, **options
                )
            _pool(pooled, weights, features, lengths, offsets, batch, 1, queries.dtype)
    return pooled, weights if keep else None


def pool_backward(grad_pooled, features, weights, lengths, offsets, scale, shared) -> Tensor:
    heads, _, slots, width = grad_pooled.shape
    features, batch = dense(features), len(features) if offsets is None else len(offsets) - 1
    lengths, offsets = contiguous(lengths, offsets)
    if shared:
        options = _tuned("pool", pool_options, features.device, grad_pooled.dtype, heads * slots)
        programs = cdiv(width, options["BD"]) * cdiv(heads * slots, options["BQ"])
        parts, rows = partition(batch, weights.numel() // max(batch * heads * slots, 1), programs)
        grad = weights.new_empty(parts, heads, slots, width).transpose(0, 1)  # (H, parts, S, d)
    else:
        rows, grad = 1, weights.new_empty(heads, batch, slots, width)
    if grad.numel():
        grad_scores = torch.empty_like(weights)
        with guard(features.device):
            if weights.numel():
                _scores(grad_scores, grad_pooled, features, lengths, offsets, batch)
                options = tuned.options("label_cross_attention", "softmax_backward", weights.device, SOFTMAX)
                triton_kernels.label_cross_attention_softmax_bwd_kernel[cdiv(heads * slots, options["BQ"]) * batch,](
                    grad_scores, weights, lengths, offsets, features.shape[-2], heads * slots, scale, **options
                )
            _pool(grad, grad_scores, features, lengths, offsets, batch, rows, grad_pooled.dtype)
    return grad.sum(1, keepdim=True) if shared and grad.shape[1] > 1 else grad


def _scores(scores, queries, features, lengths, offsets, batch):
    heads, given, slots, width = queries.shape
    n = features.shape[-2]
    options = _tuned("scores", scores_options, features.device, queries.dtype, heads * slots)
    tiles = batch * cdiv(n, options["BN"]) if offsets is None else n // options["BN"] + batch
    triton_kernels.label_cross_attention_scores_kernel[cdiv(heads * slots, options["BQ"]) * tiles,](
        scores, queries, features, lengths, offsets,
        n, batch, slots, heads * slots, width, queries.stride(0), queries.stride(1) if given > 1 else 0,
        *_strides(features),
        BLACKWELL=on_blackwell(features.device), **options,
    )  # fmt: skip


def _pool(out, weights, features, lengths, offsets, batch, rows, product):
    """Pools features into ``out``, (H, parts of ``rows`` rows, slots, d).

    ``product``: the dtype of the matmul's operands.
    """
    heads, parts, slots, width = out.shape
    options = _tuned("pool", pool_options, features.device, product, heads * slots)
    programs = cdiv(heads * slots, options["BQ"]) * cdiv(width, options["BD"]) * parts
    triton_kernels.label_cross_attention_pool_kernel[programs,](
        out, weights, features, lengths, offsets,
        features.shape[-2], batch, rows, slots, heads * slots, width, *out.stride()[:2], *_strides(features),
        WIDE=product == torch.float32, BLACKWELL=on_blackwell(features.device), **options,
    )  # fmt: skip


def _tuned(kernel, shipped_options, device, product, queries):
    shipped = shipped_options(unit_of(device, product), queries)
    return tuned.options("label_cross_attention", kernel, device, shipped, product.itemsize, shipped["BQ"])


@cache
def scores_options(unit: str, queries: int) -> dict:
    block = block_of_queries(unit, queries)
    return {
        "BN": CONFIGS[unit, block].scores.tall,
        "BQ": block,
        "BK": CONFIGS[unit, block].scores.depth,
        **_options(CONFIGS[unit, block].scores),
    }


@cache
def pool_options(unit: str, queries: int) -> dict:
    block = block_of_queries(unit, queries)
    return {
        "BD": CONFIGS[unit, block].pool.tall,
        "BQ": block,
        "BN": CONFIGS[unit, block].pool.depth,
        **_options(CONFIGS[unit, block].pool),
    }


def block_of_queries(unit: str, queries: int) -> int:
    blocks = sorted(block for of_unit, block in CONFIGS if of_unit == unit)
    return next((block for block in blocks if block >= queries), blocks[-1])


def unit_of(device: torch.device, dtype: torch.dtype) -> str:
    """Returns the unit that multiplies in ``dtype``."""
    if device_of(device)[0] == "gfx942":
        return "amd"
    return "fma" if dtype == torch.float32 else "half"


def on_blackwell(device: torch.device) -> bool:
    return device_of(device)[0] == "sm_100"


def _options(config):
    return {**COMPILER_OPTIONS, "num_warps": config.num_warps, "num_stages": config.num_stages}


def _strides(features):
    """Returns the strides of rows of the batch and of tokens."""
    return features.stride(0) if features.ndim == 3 else 0, features.stride(-2)
