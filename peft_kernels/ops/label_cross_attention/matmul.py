"""The absorbed form with batched library matmuls, in the queries' dtype."""

import torch

from .padding import padded, unpadded

__all__ = ["pool", "pool_backward", "unavailable"]


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    return None


def pool(queries, features, lengths, offsets, scale, keep):
    heads, rows, slots, width = queries.shape
    features, mask = padded(features.to(queries.dtype), lengths, offsets)
    queries = _rows_first(queries).mT  # (B or 1, d, H * S)
    scores = features @ queries[0] if rows == 1 else torch.bmm(features, queries)  # (B, n, H * S)
    scores = scores.float() * scale
    if mask is not None:
        scores = scores.masked_fill_(~mask[..., None], -torch.inf)
    weights = scores.softmax(1)
    if mask is not None:
        weights = weights.masked_fill_(~mask[..., None], 0)
    pooled = torch.bmm(weights.mT.to(features.dtype), features)
    return _heads_first(pooled, heads, slots), unpadded(weights, mask, offsets) if keep else None


def pool_backward(grad_pooled, features, weights, lengths, offsets, scale, shared):
    heads, _, slots, width = grad_pooled.shape
    features, mask = padded(features.to(grad_pooled.dtype), lengths, offsets)
    weights, _ = padded(weights, lengths, offsets)
    grad_weights = torch.bmm(features, _rows_first(grad_pooled).mT).float()
    grad_scores = (
        torch.ops.aten._softmax_backward_data(grad_weights, weights, 1, torch.float32).mul_(scale).to(features.dtype)
    )
    if shared:
        grad = (grad_scores.flatten(0, 1).mT @ features.flatten(0, 1))[None]
    else:
        grad = torch.bmm(grad_scores.mT, features)
    return _heads_first(grad.float(), heads, slots)


def _rows_first(x):
    """Returns (H, B, S, d) as (B, H * S, d)."""
    return x.transpose(0, 1).flatten(1, 2)


def _heads_first(x, heads, slots):
    return x.unflatten(1, (heads, slots)).transpose(0, 1).contiguous()
