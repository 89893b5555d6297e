"""The reference in plain PyTorch, which tests compare with: attention of every stream over its own input.

    S = scale * Q K^T over the input's first key_lengths keys,  lse = log sum_j exp S_j,  P = exp(S - lse),  O = P V
    dV = P^T dO,  dS = P (dO V^T - rowsum(dO O) + dlse),  dQ = scale dS K,  dK = scale dS^T Q

A row without keys has O = 0, lse = -inf and gradient 0.
"""

import torch
from torch import Tensor

from .layout import as_token_major


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    return None


def _per_stream(query: Tensor, key: Tensor, key_lengths: Tensor | None, encoder_index: Tensor | None):
    """Returns the input of every stream, (N,), and the mask of the keys that each stream sees, (N, 1, 1, n)."""
    if encoder_index is None:
        repeats = query.shape[0] // max(key.shape[0], 1)
        index = torch.arange(key.shape[0], device=query.device).repeat_interleave(repeats)
    else:
        index = encoder_index.long()
    positions = torch.arange(key.shape[2], device=query.device)
    lengths = key_lengths[index] if key_lengths is not None else torch.full_like(index, key.shape[2])
    return index, (positions < lengths[:, None])[:, None, None]


def _probabilities(query: Tensor, key: Tensor, visible: Tensor, scale: float):
    scores = torch.einsum("uhtd,uhnd->uhtn", query, key) * scale  # (N, H, t, n)
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores.to(torch.promote_types(scores.dtype, torch.float32)), -1)  # (N, H, t)
    # not exp(scores - lse), which inherits the rounding error of a large lse
    return torch.softmax(scores, -1).masked_fill(~visible, 0), lse


def forward(query, key, value, key_lengths, encoder_index, scale, need_lse=True) -> tuple[Tensor, Tensor]:
    index, visible = _per_stream(query, key, key_lengths, encoder_index)
    p, lse = _probabilities(query, key[index], visible, scale)
    value = value[index].masked_fill(~visible.transpose(-1, -2), 0)  # padding may hold anything, NaN too
    return as_token_major(torch.einsum("uhtn,uhnd->uhtd", p, value)), as_token_major(lse)


def backward(
    grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, need_query, need_key, need_value
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    index, visible = _per_stream(query, key, key_lengths, encoder_index)
    hidden = ~visible.transpose(-1, -2)
    keys, values = key[index].masked_fill(hidden, 0), value[index].masked_fill(hidden, 0)
    p, _ = _probabilities(query, keys, visible, scale)

    def over_streams(per_stream):  # (N, H, n, D) -> (b, H, n, D)
        wide = per_stream.to(torch.promote_types(per_stream.dtype, torch.float32))
        total = torch.zeros(key.shape, dtype=wide.dtype, device=key.device).index_add(0, index, wide)
        return as_token_major(total.to(key.dtype))

    if need_query or need_key:
        delta = (grad_out * out).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[..., None].to(delta.dtype)
        ds = p * (torch.einsum("uhtd,uhnd->uhtn", grad_out, values) - delta) * scale
    return (
        as_token_major(torch.einsum("uhtn,uhnd->uhtd", ds, keys)) if need_query else None,
        over_streams(torch.einsum("uhtn,uhtd->uhnd", ds, query)) if need_key else None,
        over_streams(torch.einsum("uhtn,uhtd->uhnd", p, grad_out)) if need_value else None,
    )
