"""The absorbed form: small library matmuls apply ``w_k`` to the queries and ``w_v`` to the pooled features."""

import torch

__all__ = ["backward", "forward"]


def forward(pool, query, features, w_k, w_v, lengths, offsets, heads, keep):
    """Returns the result (B, S, d), the attention weights and the pooled features, by the implementation's ``pool``."""
    rows, slots, width = query.shape
    queries = torch.bmm(_by_head(query, heads), _of_heads(w_k, heads)).view(heads, rows, slots, width)
    pooled, weights = pool(queries, features, lengths, offsets, _scale(width, heads), keep)
    batch = pooled.shape[1]
    out = torch.bmm(pooled.view(heads, batch * slots, width), _of_heads(w_v, heads).mT)  # (H, B * S, d / H)
    return out.transpose(0, 1).reshape(batch, slots, width), weights, pooled if keep else None


def backward(
    pool_backward, grad, query, features, w_k, w_v, weights, pooled, lengths, offsets, heads, need_query, need_key,
    need_value,
):  # fmt: skip
    rows, slots, width = query.shape
    batch = grad.shape[0]
    grad = _by_head(grad, heads)
    grad_query = grad_key = grad_value = None
    if need_value:
        grad_value = torch.bmm(grad.mT, pooled.view(heads, batch * slots, width)).view(width, width)
    if need_query or need_key:
        grad_pooled = torch.bmm(grad, _of_heads(w_v, heads)).view(heads, batch, slots, width)
        grad_queries = pool_backward(grad_pooled, features, weights, lengths, offsets, _scale(width, heads), rows == 1)
        grad_queries = grad_queries.to(query.dtype).view(heads, rows * slots, width)
        if need_query:
            grad_query = torch.bmm(grad_queries, _of_heads(w_k, heads).mT).transpose(0, 1).reshape(query.shape)
        if need_key:
            grad_key = torch.bmm(_by_head(query, heads).mT, grad_queries).view(width, width)
    return grad_query, grad_key, grad_value


def _scale(width, heads):
    return (width // heads) ** -0.5


def _by_head(x, heads):
    """Returns (rows, S, d) as (H, rows * S, d / H)."""
    rows, slots, width = x.shape
    return x.reshape(rows * slots, heads, width // heads).transpose(0, 1)


def _of_heads(weight, heads):
    """Returns (d, d) as (H, d / H, d)."""
    return weight.reshape(heads, -1, weight.shape[1])
