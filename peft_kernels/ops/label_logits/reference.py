"""The reference in plain PyTorch, which tests compare with. Any device, any dtype."""

import torch


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    return None


def forward(hidden, weight, label_ids, bias, positions):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if positions is not None:
        hidden = hidden[torch.arange(hidden.shape[0], device=hidden.device), positions.long()]
    ids = label_ids.clamp_min(0).flatten().long()
    words = hidden.to(wide) @ weight[ids].to(wide).mT  # [B, C * w]
    if bias is not None:
        words = words + bias[ids].to(wide)
    return words.masked_fill((label_ids < 0).flatten(), -torch.inf).view(hidden.shape[0], *label_ids.shape)


def backward(grad_words, weight, label_ids):
    return grad_words.flatten(1) @ weight[label_ids.clamp_min(0).flatten().long()].to(grad_words.dtype)
