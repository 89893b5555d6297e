"""Two batched matmuls over folded rows, a few heads at a time so that their scores stay in the cache (CPU)."""

import torch
from torch import Tensor

from . import folding

SCORE_BYTES = 8 << 20  # size of the scores of one block of heads


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    return folding.unavailable(device)


def forward(query, key, value, key_lengths, encoder_index, scale, need_lse):
    return folding.forward(_attend, query, key, value, key_lengths, encoder_index, scale, need_lse)


def backward(grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs):
    return folding.backward(
        _attend_backward, grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs
    )


def _blocks(query: Tensor, key: Tensor):
    """Returns slices of the flattened (input, head) axis, and a buffer for the scores of the largest slice."""
    heads, rows, n = query.shape[0], query.shape[1], key.shape[1]
    step = max(1, min(heads, SCORE_BYTES // (rows * n * query.element_size())))
    return [slice(h, min(h + step, heads)) for h in range(0, heads, step)], query.new_empty((step, rows, n))


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.flatten(0, 1) for x in tensors]  # (g, H, ...) -> (g*H, ...)


def _attend(query, key, value, scale, need_lse):
    g, heads, rows, width = query.shape
    q, k, v = _heads_first(query, key, value)
    out = q.new_empty((g * heads, rows, width))
    lse = q.new_empty((g * heads, rows), dtype=torch.promote_types(q.dtype, torch.float32)) if need_lse else None
    blocks, buffer = _blocks(q, k)
    for block in blocks:
        scores = buffer[: block.stop - block.start]
        torch.baddbmm(scores, q[block], k[block].transpose(1, 2), beta=0, alpha=scale, out=scores)
        if need_lse:
            lse[block] = torch.logsumexp(scores.to(lse.dtype), -1)
        torch._softmax(scores, -1, False, out=scores)
        torch.bmm(scores, v[block], out=out[block])
    return out.view(g, heads, rows, width), lse.view(g, heads, rows) if need_lse else None


def _attend_backward(grad_out, grad_lse, query, key, value, out, lse, scale, needs):
    g, heads = query.shape[:2]
    do, q, k, v = _heads_first(grad_out, query, key, value)
    dlse = None if grad_lse is None else grad_lse.flatten(0, 1).to(q.dtype)
    pairs = zip((q, k, v), needs)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None for x, needed in pairs]
    dq, dk, dv = grads
    blocks, p_buffer = _blocks(q, k)
    ds_buffer = torch.empty_like(p_buffer) if dq is not None or dk is not None else None
    for block in blocks:
        size = block.stop - block.start
        p = p_buffer[:size]
        torch.baddbmm(p, q[block], k[block].transpose(1, 2), beta=0, alpha=scale, out=p)
        torch._softmax(p, -1, False, out=p)
        if dv is not None:
            torch.bmm(p.transpose(1, 2), do[block], out=dv[block])
        if ds_buffer is None:
            continue
        ds = ds_buffer[:size]
        torch.bmm(do[block], v[block].transpose(1, 2), out=ds)
        if dlse is not None:  # dS = P (dP - rowsum(P dP) + dlse): a shift of dP by dlse would cancel in the row sum
            shift = p * dlse[block][..., None]
        torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
        if dlse is not None:
            ds += shift
        if dq is not None:
            torch.baddbmm(dq[block], ds, k[block], beta=0, alpha=scale, out=dq[block])
        if dk is not None:
            torch.baddbmm(dk[block], ds.transpose(1, 2), q[block], beta=0, alpha=scale, out=dk[block])
    return tuple(None if x is None else x.view(g, heads, *x.shape[1:]) for x in grads)
