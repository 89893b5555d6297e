"""The memory layout of every result: tokens before heads, as models want it next to a projection."""

import torch
from torch import Tensor


def token_major(batch: int, heads: int, tokens: int, *width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (batch, heads, tokens, ...) tensor in memory (batch, tokens, heads, ...), on ``like``'s device."""
    return torch.empty((batch, tokens, heads, *width), dtype=dtype or like.dtype, device=like.device).transpose(1, 2)


def as_token_major(x: Tensor) -> Tensor:
    """``x`` (batch, heads, tokens, ...) in that layout; copied only where it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def fold(x: Tensor, inputs: int) -> Tensor:
    """(g*M, H, t, ...) -> (g, H, M*t, ...) for g inputs; a view where ``x`` is token-major."""
    x = x.transpose(1, 2)
    return x.reshape(inputs, x.shape[0] // inputs * x.shape[1], *x.shape[2:]).transpose(1, 2)


def unfold(x: Tensor, tokens: int) -> Tensor:
    """(g, H, M*t, ...) -> (g*M, H, t, ...), token-major."""
    x = x.transpose(1, 2)
    return x.reshape(-1, tokens, *x.shape[2:]).transpose(1, 2)
