"""Launchers and default configs of the Triton kernels.

No launch synchronizes with the device or depends on a value there.
"""

from functools import cache

import torch

from .. import triton_runtime, tuned
from ..triton_runtime import COMPILER_OPTIONS, cdiv, guard, kernel_module, partition

triton_kernels = kernel_module(__package__)

__all__ = ["backward", "cross_entropy", "forward", "unavailable"]

# Elements per program, in whole rows, and per warp. `make test-kernels` compiles the configs for every architecture,
# without a GPU.
ELEMENTS = 1024
ELEMENTS_PER_WARP = 256
MAX_ROWS = 16
MAX_WARPS = 16


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    if dtype != torch.float32:
        return f"its kernels take torch.float32, not {dtype}"
    return triton_runtime.unavailable(device, dtype)


def forward(projected, prototypes, radius, scores, weight):
    (texts, width), classes = projected.shape, prototypes.shape[0]
    out = projected.new_empty(texts, classes)
    if texts:
        options = _tuned("forward", projected)
        with guard(projected.device):
            triton_kernels.prototype_scores_fwd_kernel[cdiv(texts, options["BR"]),](
                out, projected, prototypes, radius, scores, weight, texts, classes, width, **options
            )
    return out


def backward(grad, projected, prototypes):
    (texts, width), classes = projected.shape, prototypes.shape[0]
    grad_projected = torch.empty_like(projected)
    parts, rows = partition(texts, 1, classes)
    partial = projected.new_empty(parts, classes, width)
    with guard(projected.device):
        if texts:
            options = _tuned("backward", projected)
            triton_kernels.prototype_scores_bwd_kernel[cdiv(texts, options["BR"]),](
                grad_projected, grad, projected, prototypes, texts, classes, width, **options
            )  # fmt: skip
        triton_kernels.prototype_scores_bwd_prototypes_kernel[parts * classes,](
            partial, grad, projected, prototypes, texts, rows, classes, width, **_tuned("prototypes", projected)
        )  # fmt: skip
    return grad_projected, partial[0] if parts == 1 else partial.sum(0)


def cross_entropy(projected, prototypes, radius, scores, weight, labels):
    (texts, width), classes = projected.shape, prototypes.shape[0]
    (labels,) = triton_runtime.contiguous(labels)
    options = _tuned("cross_entropy", projected)
    blocks = cdiv(texts, options["BR"])
    losses, partial = projected.new_empty(texts), projected.new_empty(classes, blocks)
    grad_projected = torch.empty_like(projected)
    if texts:
        with guard(projected.device):
            triton_kernels.prototype_cross_entropy_fwd_kernel[blocks,](
                losses, grad_projected, partial, projected, prototypes, radius, scores, labels,
                weight, texts, classes, width,
                **options,
            )  # fmt: skip
    return losses.sum() / max(texts, 1), grad_projected, partial.sum(1)


def _tuned(kernel, projected):
    shipped = row_options(projected.shape[1])
    return tuned.options("prototype_scores", kernel, projected.device, shipped, shipped["BD"])


@cache
def row_options(width: int) -> dict:
    columns = 1 << max(width - 1, 0).bit_length()
    rows = max(1, min(ELEMENTS // columns, MAX_ROWS))
    num_warps = min(max(rows * columns // ELEMENTS_PER_WARP, 1), MAX_WARPS)
    return {"BR": rows, "BD": columns, "num_warps": num_warps, **COMPILER_OPTIONS}
