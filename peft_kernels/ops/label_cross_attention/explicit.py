"""Keys and values with library matmuls in the weights' dtype, for many slots: the absorbed form's would be larger."""

import torch
from torch.nn.functional import linear

from .padding import padded, unpadded

__all__ = ["backward", "forward", "unavailable"]


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    return None


def forward(query, features, w_k, w_v, lengths, offsets, heads, keep):
    keys_values = linear(features.to(query.dtype), torch.cat((w_k, w_v)))  # (..., 2 d)
    key, value, mask = _heads(keys_values, lengths, offsets, heads)
    out = _weights(_split(query, heads), key, mask) @ value  # (B, H, S, d / H)
    return out.transpose(1, 2).flatten(2), keys_values if keep else None


def backward(grad, query, features, w_k, w_v, keys_values, lengths, offsets, heads):
    key, value, mask = _heads(keys_values, lengths, offsets, heads)
    q, grad = _split(query, heads), _split(grad, heads)
    weights = _weights(q, key, mask)
    grad_weights = (grad @ value.mT).float()
    wide = weights.float()
    scale = q.shape[-1] ** -0.5
    grad_scores = (wide * (grad_weights - (wide * grad_weights).sum(-1, keepdim=True)) * scale).to(q.dtype)
    grad_query = _joined((grad_scores @ key).float()).sum_to_size(query.shape).to(query.dtype)
    if lengths is not None:
        features, _ = padded(features, lengths, None)
    features = features.to(q.dtype).flatten(0, -2)
    grads = (unpadded(_joined(g), mask, offsets) for g in (grad_scores.mT @ q, weights.mT @ grad))
    return grad_query, *(g.flatten(0, -2).mT @ features for g in grads)


def _heads(keys_values, lengths, offsets, heads):
    keys_values, mask = padded(keys_values, lengths, offsets)
    return *(_split(x, heads) for x in keys_values.chunk(2, -1)), mask


def _weights(q, key, mask):
    scores = (q @ key.mT).float() * q.shape[-1] ** -0.5  # (B, H, S, n)
    if mask is not None:
        mask = mask[:, None, None]
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return (weights if mask is None else weights.masked_fill(~mask, 0)).to(q.dtype)


def _split(x, heads):
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _joined(x):
    return x.transpose(1, 2).flatten(2)
