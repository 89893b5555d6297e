"""The reference in plain PyTorch, which tests compare with. Any device, any dtype."""

import torch
from torch import Tensor

from .layout import prompt_columns, token_columns


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    return None


def forward(
    input_ids, weight, prompt, a, b, delta, scale, embed_scale, offsets, insert_after_first, adapter_ids
) -> Tensor:
    batch, length = input_ids.shape
    adapters, virtual, width = prompt.shape
    if delta is None:
        delta = scale * (a @ b)  # (K, s, d)
    adapter, has_adapter, position, updated = _indices(batch, length, offsets, adapter_ids, weight.device)
    out = weight.new_empty(batch, virtual + length, width)
    prompts = prompt[adapter].masked_fill(~has_adapter[:, None, None], 0)
    out[:, prompt_columns(virtual, insert_after_first)] = prompts.to(weight.dtype)
    low_rank = delta[adapter[:, None], position].masked_fill(~updated[..., None], 0)
    rows = embed_scale * weight[input_ids].to(delta.dtype) + low_rank
    for tokens, columns in token_columns(virtual, length, insert_after_first):
        out[:, columns] = rows[:, tokens].to(weight.dtype)
    return out


def backward(
    grad, adapters, virtual, positions, offsets, insert_after_first, adapter_ids, need_prompt, need_delta
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of prompt (K, m, d) and delta (K, s, d), summed over the batch in at least float32."""
    batch, length, width = grad.shape[0], grad.shape[1] - virtual, grad.shape[2]
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    adapter, has_adapter, position, updated = _indices(batch, length, offsets, adapter_ids, grad.device)
    grad_prompt = grad_delta = None
    if need_prompt:
        rows = grad[:, prompt_columns(virtual, insert_after_first)].masked_fill(~has_adapter[:, None, None], 0)
        grad_prompt = grad.new_zeros(adapters, virtual, width).index_add_(0, adapter, rows)
    if need_delta:
        rows = torch.cat([grad[:, columns] for _, columns in token_columns(virtual, length, insert_after_first)], 1)
        rows = rows.masked_fill(~updated[..., None], 0)
        indices = adapter[:, None].expand_as(position), position
        grad_delta = grad.new_zeros(adapters, positions, width).index_put_(indices, rows, accumulate=True)
    return grad_prompt, grad_delta


def _indices(batch, length, offsets, adapter_ids, device):
    """Returns per row its adapter, and whether it has one; per token its row of delta, and whether it gets that row."""
    adapter = torch.zeros(batch, dtype=torch.long, device=device) if adapter_ids is None else adapter_ids.long()
    position = torch.arange(length, device=device).expand(batch, -1)
    if offsets is not None:
        position = position - offsets.long()[:, None]
    has_adapter = adapter >= 0
    return adapter.clamp_min(0), has_adapter, position.clamp_min(0), has_adapter[:, None] & (position >= 0)
