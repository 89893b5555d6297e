"""The memory layout of every result: tokens before heads, as models want it next to a projection."""

import torch
from torch import Tensor


def token_major(batch: int, heads: int, tokens: int, *width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (batch, heads, tokens, ...) tensor in memory (batch, tokens, heads, ...), on ``like``'s device."""
    return torch.empty((batch, tokens, heads, *width), dtype=dtype or like.dtype, device=like.device).transpose(1, 2)


def as_token_major(x: Tensor) -> Tensor:
    """``x`` (batch, heads, tokens, ...) in that layout; copied only where it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
