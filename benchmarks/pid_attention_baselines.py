"""The published ways to compute shared cross-attention. Each prepares a problem once and attends as often as it is asked.

``prepare(problem, backward)`` returns ``attend(query, key, value)``, the tensors to call it with, and a function that brings
(out, dQ, dK, dV) into the operator's shapes, or None where they have them. It raises where the way does not apply, with the reason.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from peft_kernels.ops.shared_cross_attention.folding import fold, unfold


def _mask(p):
    """(b, 1, 1, n), true where there is a key; None without lengths."""
    return None if p.lengths is None else (torch.arange(p.shape[3], device=p.key.device) < p.lengths[:, None])[:, None, None]


def _expanded(p):
    """Keys and values repeated per stream, and the mask; gradients of the copies are summed for the check only."""
    inputs, streams, _, _ = p.shape
    mask = _mask(p)
    tensors = p.query, p.key.repeat_interleave(streams, 0), p.value.repeat_interleave(streams, 0)

    def restore(results):
        out, *grads = results
        return (out, *grads[:1], *(g.double().unflatten(0, (inputs, streams)).sum(1) for g in grads[1:]))

    return tensors, None if mask is None else mask.repeat_interleave(streams, 0), restore


def eager_expanded(p, backward):
    """As transformers' eager_attention_forward: an additive mask, softmax in float32."""
    tensors, mask, restore = _expanded(p)
    if mask is not None:
        mask = torch.where(mask, 0.0, torch.finfo(p.query.dtype).min).to(p.query.dtype)
    scale = p.query.shape[-1] ** -0.5

    def attend(query, key, value):
        scores = torch.matmul(query, key.transpose(2, 3)) * scale
        if mask is not None:
            scores = scores + mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, value)

    return attend, tensors, restore


def sdpa_expanded(p, backward):
    tensors, mask, restore = _expanded(p)

    def attend(query, key, value):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return attend, tensors, restore


def _folded(p, attention):
    """``attention`` on (b, H, M*t, D) queries."""
    inputs, _, tokens, _ = p.shape

    def attend(query, key, value):
        return unfold(attention(fold(query, inputs), key, value), tokens)

    return attend, (p.query, p.key, p.value), None


def folded_sdpa(p, backward):
    if p.lengths is not None:
        raise ValueError("no mask, so not with ragged lengths")
    return _folded(p, scaled_dot_product_attention)


def folded_sdpa_masked(p, backward):
    if p.lengths is None:
        raise ValueError("with a key mask, so with ragged lengths only")
    mask = _mask(p)
    return _folded(p, lambda query, key, value: scaled_dot_product_attention(query, key, value, attn_mask=mask))


def folded_matmuls(p, backward):
    """Two products and a softmax in the dtype."""
    mask, scale = _mask(p), p.query.shape[-1] ** -0.5

    def attention(query, key, value):
        scores = torch.matmul(query * scale, key.transpose(2, 3))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.matmul(torch.softmax(scores, -1), value)

    return _folded(p, attention)


def flex(p, backward):
    if p.query.device.type != "cuda":
        raise ValueError("measured on CUDA only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    inputs, streams, tokens, n = p.shape
    block_mask = None
    if p.lengths is not None:
        lengths = p.lengths
        block_mask = create_block_mask(lambda b, h, q, k: k < lengths[b], inputs, None, streams * tokens, n, device="cuda")
    torch.compiler.reset()  # the shapes before count towards the limit of recompilations
    compiled = torch.compile(flex_attention, dynamic=False)
    return _folded(p, lambda query, key, value: compiled(query, key, value, block_mask=block_mask))


def varlen(p, backward):
    """Inputs as sequences of M*t queries: ``seqused_k`` in inference, keys packed in training."""
    if p.query.device.type != "cuda":
        raise ValueError("CUDA only")
    if p.query.dtype == torch.float32:
        raise ValueError("16-bit types only")
    from torch.nn.attention.varlen import varlen_attn

    inputs, streams, tokens, n = p.shape
    device, rows = p.key.device, streams * tokens
    packed = backward and p.lengths is not None
    counts = p.lengths if packed else torch.full((inputs,), n, device=device)
    cu_rows = torch.arange(inputs + 1, device=device, dtype=torch.int32) * rows
    cu_keys = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    used = None if packed or p.lengths is None else p.lengths.to(torch.int32)
    keep = torch.arange(n, device=device) < counts[:, None]  # (b, n)
    key, value = (x.transpose(1, 2)[keep] for x in (p.key, p.value))  # (T_k, H, D)

    def attend(query, key, value):
        flat = query.transpose(1, 2).flatten(0, 1)  # (N*t, H, D), a view
        out = varlen_attn(flat, key, value, cu_rows, cu_keys, rows, n, seqused_k=used)
        return out.unflatten(0, (-1, tokens)).transpose(1, 2)

    def restore(results):
        out, *grads = results
        full = [torch.zeros_like(p.key).transpose(1, 2) for _ in grads[1:]]
        for target, g in zip(full, grads[1:]):
            target[keep] = g
        return (out, *grads[:1], *(x.transpose(1, 2) for x in full))

    return attend, (p.query, key, value), restore


BASELINES = {
    "eager expanded": eager_expanded,
    "sdpa expanded": sdpa_expanded,
    "fold + sdpa, key mask": folded_sdpa_masked,
    "fold + sdpa": folded_sdpa,
    "fold + two matmuls": folded_matmuls,
    "fold + flex, compiled": flex,
    "fold + varlen_attn": varlen,
}
