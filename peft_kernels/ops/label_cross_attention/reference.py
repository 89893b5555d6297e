"""The reference in plain PyTorch, which tests compare with: keys, values and softmax in float32 or float64."""

import torch

from .padding import padded

__all__ = ["backward", "forward", "unavailable"]


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    return None


def forward(query, features, w_k, w_v, lengths, offsets, heads, keep):
    wide = torch.promote_types(query.dtype, torch.float32)
    features, mask = padded(features.to(wide), lengths, offsets)
    q, k, v = _heads(query, features, w_k, w_v, heads, wide)
    out = _weights(q, k, mask) @ v  # (B, H, S, d / H)
    return out.transpose(1, 2).flatten(2).to(query.dtype), None


def backward(grad, query, features, w_k, w_v, saved, lengths, offsets, heads):
    wide = torch.promote_types(query.dtype, torch.float32)
    features, mask = padded(features.to(wide), lengths, offsets)
    q, k, v = _heads(query, features, w_k, w_v, heads, wide)
    weights = _weights(q, k, mask)
    grad = _split(grad.to(wide), heads)
    grad_weights = grad @ v.mT
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    grad_query = _joined(grad_scores @ k).sum_to_size(query.shape)
    grad_key, grad_value = _joined(grad_scores.mT @ q), _joined(weights.mT @ grad)
    grads = grad_query, *(torch.einsum("bne,bnd->ed", g, features) for g in (grad_key, grad_value))
    return tuple(g.to(query.dtype) for g in grads)


def _heads(query, features, w_k, w_v, heads, wide):
    return tuple(_split(x, heads) for x in (query.to(wide), features @ w_k.to(wide).mT, features @ w_v.to(wide).mT))


def _weights(q, k, mask):
    scores = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, S, n)
    if mask is None:
        return scores.softmax(-1)
    mask = mask[:, None, None]
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)


def _split(x, heads):
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _joined(x):
    return x.transpose(1, 2).flatten(2)
