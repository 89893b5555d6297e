"""Launchers and default configs of the Triton kernels.

No launch synchronizes with the device or depends on a value there.
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
    guard,
    kernel_module,
    partition,
    strides,
    unavailable,
)
from ..vector_dropout import threshold

triton_kernels = kernel_module(__package__)

__all__ = ["add_", "backward", "slots", "unavailable"]


class Config(NamedTuple):
    """Columns per block, at most, and rows: in backward, the rows of the gradient that are loaded at once."""

    columns: int
    num_warps: int
    rows: int = 1


# Keyed by bytes per element. `make test-kernels` compiles every row for every architecture, without a GPU.
SLOTS = Config(1024, 4)
ADD = {2: Config(1024, 4), 4: Config(512, 4)}
BACKWARD = {2: Config(256, 4, 8), 4: Config(128, 4, 8)}


def slots(input_ids, special_ids, attention_mask, max_slots) -> tuple[Tensor, Tensor]:
    batch, length = input_ids.shape
    found = input_ids.new_empty(batch, max_slots, dtype=torch.int32)
    counts = input_ids.new_empty(batch, dtype=torch.int32)
    if batch:
        with guard(input_ids.device):
            triton_kernels.special_token_slots_kernel[batch,](
                found, counts, input_ids, special_ids, attention_mask,
                length, len(special_ids), max_slots, *input_ids.stride(), special_ids.stride(0),
                *strides(attention_mask, 2),
                **tuned.options("special_tokens", "slots", input_ids.device, slots_options()),
            )  # fmt: skip
    return found, counts


def add_(hidden, vectors, slots, dropout_p, seed, adapter_ids) -> None:
    (batch, slots_per_row), (adapters, vectors_per_adapter, width) = slots.shape, vectors.shape
    if not batch * slots_per_row * width:
        return
    (vectors,) = contiguous(vectors)
    options = tuned.options(
        "special_tokens", "add", hidden.device, add_options(hidden.element_size()), hidden.element_size()
    )
    with guard(hidden.device):
        triton_kernels.special_token_add_kernel[cdiv(width, options["BD"]) * batch * slots_per_row,](
            hidden, vectors, slots, adapter_ids, seed,
            hidden.shape[1], slots_per_row, adapters, vectors_per_adapter, width, *dropout(dropout_p),
            *hidden.stride(), *slots.stride(), *strides(adapter_ids, 1),
            **options,
        )  # fmt: skip


def backward(grad, slots, adapters, vectors, dropout_p, seed, adapter_ids, by_slot_of=None) -> Tensor:
    """Returns the gradient of the vectors. ``by_slot_of``: S; grad is (B, k, d), a row for every slot."""
    (batch, slots_per_row), width, by_slot = slots.shape, grad.shape[2], by_slot_of is not None
    grad = dense(grad)
    options = tuned.options(
        "special_tokens", "backward", grad.device, backward_options(grad.element_size(), by_slot), grad.element_size()
    )
    programs = cdiv(width, options["BD"]) * adapters * vectors
    parts, rows = partition(batch, max(1, slots_per_row - vectors + 1), programs)
    partial = grad.new_empty(parts, adapters, vectors, width, dtype=torch.float32)
    if partial.numel():
        with guard(grad.device):
            triton_kernels.special_token_add_bwd_kernel[parts * programs,](
                partial, grad, slots, adapter_ids, seed,
                batch, by_slot_of if by_slot else grad.shape[1], rows, slots_per_row, adapters, vectors, width,
                *dropout(dropout_p),
                *grad.stride()[:2], *slots.stride(), *strides(adapter_ids, 1),
                **options,
            )  # fmt: skip
    return partial[0] if parts == 1 else partial.sum(0)


@cache
def slots_options() -> dict:
    return {"BS": SLOTS.columns, "num_warps": SLOTS.num_warps, **COMPILER_OPTIONS}


@cache
def add_options(size: int) -> dict:
    return {"BD": ADD[size].columns, "num_warps": ADD[size].num_warps, **COMPILER_OPTIONS}


@cache
def backward_options(size: int, by_slot: bool) -> dict:
    config = BACKWARD[size]
    return {
        "BY_SLOT": by_slot,
        "BN": config.rows,
        "BD": config.columns,
        "num_warps": config.num_warps,
        **COMPILER_OPTIONS,
    }


def dropout(p: float) -> tuple[int, float]:
    """Returns the threshold, its 32 bits as int32 so that every threshold has one type, and the factor of kept
    elements.
    """
    bits = threshold(p)
    return bits - (1 << 32) if bits >= 1 << 31 else bits, 1 / (1 - p)
