"""PyTorch's CPU flash attention over folded rows: the scores are never stored."""

import torch

from . import folding

_aten = torch.ops.aten


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    return folding.unavailable(device)


def forward(query, key, value, key_lengths, encoder_index, scale, need_lse):
    return folding.forward(_attend, query, key, value, key_lengths, encoder_index, scale, need_lse)


def backward(grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs):
    return folding.backward(
        _attend_backward, grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs
    )


def _attend(query, key, value, scale, need_lse):
    query, key, value = _rows_contiguous(query, key, value)
    return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)


def _attend_backward(grad_out, grad_lse, query, key, value, out, lse, scale, needs):
    grad_out, query, key, value, out = _rows_contiguous(grad_out, query, key, value, out)

    def library(grad):
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, False, scale=scale
        )

    dq, dk, dv = library(grad_out)
    # d lse / dS = P: its gradient of the queries is an attention with values K, that of the keys a gradient of values
    if grad_lse is not None:
        weight = scale * grad_lse[..., None].to(query.dtype)
        dq = dq + weight * _attend(query, key, key, scale, False)[0]
        dk = dk + library(weight * query)[2]
    return tuple(g if needed else None for g, needed in zip((dq, dk, dv), needs))


def _rows_contiguous(*tensors):
    """Makes the last stride 1, which the library assumes without a check."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
