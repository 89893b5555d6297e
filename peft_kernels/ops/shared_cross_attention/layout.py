"""The memory layout of every result: tokens before heads, as a model's output projection needs it."""

import torch
from torch import Tensor


def token_major(
    batch: int, heads: int, tokens: int, *width: int, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns an uninitialised (batch, heads, tokens, ...) tensor, laid out as (batch, tokens, heads, ...)."""
    return torch.empty((batch, tokens, heads, *width), dtype=dtype or like.dtype, device=like.device).transpose(1, 2)


def as_token_major(x: Tensor) -> Tensor:
    """Returns ``x``, (batch, heads, tokens, ...), in the token-major layout; copies it only if it has another one."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def fold(x: Tensor, inputs: int) -> Tensor:
    """Folds (g*M, H, t, ...) into (g, H, M*t, ...) for g inputs; a view if ``x`` is token-major."""
    x = x.transpose(1, 2)
    return x.reshape(inputs, x.shape[0] // inputs * x.shape[1], *x.shape[2:]).transpose(1, 2)


def unfold(x: Tensor, tokens: int) -> Tensor:
    """Unfolds (g, H, M*t, ...) into (g*M, H, t, ...), token-major."""
    x = x.transpose(1, 2)
    return x.reshape(-1, tokens, *x.shape[2:]).transpose(1, 2)
