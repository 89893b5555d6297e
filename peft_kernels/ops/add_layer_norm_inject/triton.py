"""Launchers and default configs of the Triton kernels.

No launch synchronizes with the device or depends on a value there.
"""

from functools import cache

from torch import Tensor

from .. import tuned
from ..special_tokens import triton as special_tokens
from ..special_tokens.triton import dropout
from ..triton_runtime import COMPILER_OPTIONS, cdiv, dense, guard, kernel_module, strides, unavailable

triton_kernels = kernel_module(__package__)

__all__ = ["backward", "forward", "unavailable"]

SLOTS = 16  # slots compared at a time
# Elements per program, in whole rows, and per warp: with more, registers would limit an SM to fewer warps.
# `make test-kernels` compiles the configs for every architecture, without a GPU.
ELEMENTS = 2048
ELEMENTS_PER_WARP = 512
MAX_ROWS = 32
MAX_WARPS = 16


def forward(x, residual, weight, bias, vectors, slots, adapter_ids, eps, rms, pre, dropout_p, seed, keep):
    batch, length, width = x.shape
    x, residual = dense(x), dense(residual)
    out = x.new_empty(x.shape)
    total = x.new_empty(x.shape) if keep or pre else None
    mean = weight.new_empty(batch, length) if keep and not rms else None
    rstd = weight.new_empty(batch, length) if keep else None
    if batch * length:
        options = _tuned("forward", x)
        adapters, vectors_per_adapter = (0, 0) if vectors is None else vectors.shape[:2]
        slots_per_row = 0 if slots is None else slots.shape[1]
        with guard(x.device):
            triton_kernels.add_layer_norm_inject_fwd_kernel[cdiv(batch * length, options["BR"]),](
                out, total, mean, rstd, x, residual, weight, bias, vectors, slots, adapter_ids, seed,
                batch * length, length, slots_per_row, adapters, vectors_per_adapter, width, eps, *dropout(dropout_p),
                *x.stride()[:2], *residual.stride()[:2], *strides(slots, 2), *strides(adapter_ids, 1),
                RMS=rms, PRE=pre, **options,
            )  # fmt: skip
    return out, total, mean, rstd


def backward(
    grad,
    grad_sum,
    sum,
    mean,
    rstd,
    weight,
    slots,
    adapter_ids,
    adapters,
    vectors,
    rms,
    pre,
    dropout_p,
    seed,
    need_x,
    need_vectors,
) -> tuple[Tensor | None, Tensor | None]:
    rest = slots, adapters, vectors, dropout_p, seed, adapter_ids
    from_rows = need_vectors and pre
    grad_x, grad_slots = None, None
    if need_x or from_rows:
        grad_x, grad_slots = _rows(
            dense(grad), grad_sum, sum.contiguous(), mean, rstd, weight, slots, need_x, from_rows
        )
    if not need_vectors:
        return grad_x, None
    return grad_x, special_tokens.backward(
        grad_slots if pre else grad, *rest, by_slot_of=grad.shape[1] if pre else None
    )


def _rows(grad, grad_sum, total, mean, rstd, weight, slots, need_x, need_slots):
    """Returns the gradient of the sum, and its rows at special tokens in float32."""
    batch, length, width = grad.shape
    slots_per_row = slots.shape[1] if need_slots else 0
    grad_sum = grad_sum if grad_sum is None else dense(grad_sum)
    grad_x = grad.new_empty(grad.shape) if need_x else None
    grad_slots = weight.new_empty(batch, slots_per_row, width) if need_slots else None
    tokens = batch * (length if need_x else slots_per_row)
    if tokens * width:
        options = _tuned("backward", grad)
        with guard(grad.device):
            triton_kernels.add_layer_norm_inject_bwd_kernel[cdiv(tokens, options["BR"]),](
                grad_x, grad_slots, grad, grad_sum, total, mean, rstd, weight, slots,
                tokens, length, slots_per_row, width, *grad.stride()[:2], *strides(grad_sum, 3)[:2], *strides(slots, 2),
                LISTED=not need_x, **options,
            )  # fmt: skip
    return grad_x, grad_slots


def _tuned(kernel, x):
    shipped = row_options(x.shape[2])
    return tuned.options("add_layer_norm_inject", kernel, x.device, shipped, x.element_size(), shipped["BD"])


@cache
def row_options(width: int) -> dict:
    columns = 1 << max(width - 1, 0).bit_length()
    rows = max(1, min(ELEMENTS // columns, MAX_ROWS))
    num_warps = min(max(rows * columns // ELEMENTS_PER_WARP, 1), MAX_WARPS)
    return {"BR": rows, "BK": SLOTS, "BD": columns, "num_warps": num_warps, **COMPILER_OPTIONS}
