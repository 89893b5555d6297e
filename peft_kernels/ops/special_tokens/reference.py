"""The reference in plain PyTorch, which tests compare with. Any device, any dtype."""

import torch
from torch import Tensor

from ..vector_dropout import factors


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    return None


def slots(input_ids, special_ids, attention_mask, max_slots) -> tuple[Tensor, Tensor]:
    """Returns the slots, (B, max_slots) int32, and the number of special tokens of every row, (B,)."""
    batch, length = input_ids.shape
    special = torch.isin(input_ids, special_ids)
    if attention_mask is not None:
        special &= attention_mask != 0
    counts = special.sum(1)
    # one more slot, at the end, takes all other tokens
    slot = (special.cumsum(1) - 1).masked_fill(~special, max_slots).clamp_max(max_slots)
    positions = torch.arange(length, dtype=torch.int32, device=input_ids.device).expand(batch, -1)
    slots = torch.full((batch, max_slots + 1), -1, dtype=torch.int32, device=input_ids.device)
    return slots.scatter_(1, slot, positions)[:, :max_slots].contiguous(), counts


def add_(hidden, vectors, slots, dropout_p, seed, adapter_ids) -> None:
    rows, positions, added = injected(vectors, slots, dropout_p, seed, adapter_ids)
    hidden[rows, positions] = (hidden[rows, positions].to(added.dtype) + added).to(hidden.dtype)


def backward(grad, slots, adapters, vectors, dropout_p, seed, adapter_ids) -> Tensor:
    rows, columns, adapter = _used_slots(slots, adapter_ids)
    grads = grad[rows, slots[rows, columns].long()].to(torch.promote_types(grad.dtype, torch.float32))
    if dropout_p:
        grads = grads * factors(dropout_p, seed, *slots.shape, grad.shape[2])[rows, columns]
    result = grads.new_zeros(adapters, vectors, grad.shape[2])
    return result.index_put_((adapter, columns.clamp_max(vectors - 1)), grads, accumulate=True)


def injected(vectors, slots, dropout_p, seed, adapter_ids) -> tuple[Tensor, Tensor, Tensor]:
    """Returns row and position, (n,), of every special token that gets a vector, and the vectors, (n, d)."""
    rows, columns, adapter = _used_slots(slots, adapter_ids)
    added = vectors[adapter, columns.clamp_max(vectors.shape[1] - 1)]
    if dropout_p:
        added = added * factors(dropout_p, seed, *slots.shape, vectors.shape[2])[rows, columns]
    return rows, slots[rows, columns].long(), added


def _used_slots(slots, adapter_ids):
    """Returns row, slot and adapter of every used slot in the rows that have an adapter."""
    if adapter_ids is None:
        adapter = torch.zeros(slots.shape[0], dtype=torch.long, device=slots.device)
    else:
        adapter = adapter_ids.long()
    rows, columns = ((slots >= 0) & (adapter >= 0)[:, None]).nonzero(as_tuple=True)
    return rows, columns, adapter[rows]
