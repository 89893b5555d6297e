"""Benchmarks of shared cross-attention against every published way to compute it.

Queries are laid out as (N, t, H, D), as a model's projection produces them; keys and values as (b, H, n, D), as its
cache stores them. "expanded" baselines get keys and values that are repeated before the timing, as the library's cache
holds them, and return repeated gradients; varlen_attn gets its own layout, also before the timing. "ragged": lengths of
50 to 100 %.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from ... import ops
from ..problem import Candidate, Operator, Problem, RandomInputs, plain

HEADS = {"H": 12, "D": 64}


def problem(shape, variant, dtype, device, backward) -> Problem:
    inputs, streams, tokens, n, heads, width = (shape[letter] for letter in "bMtnHD")
    random = RandomInputs(device, dtype)
    query, grad = (random.normal(inputs * streams, tokens, heads, width).transpose(1, 2) for _ in range(2))
    key, value = (random.normal(inputs, heads, n, width) for _ in range(2))
    lengths = random.integers(n // 2, n + 1, inputs) if variant == "ragged" else None
    # [b, 1, 1, n]
    visible = None if lengths is None else (torch.arange(n, device=device) < lengths[:, None])[:, None, None]

    def ours(impl):
        return Candidate(
            lambda query, key, value: ops.shared_cross_attention(query, key, value, key_lengths=lengths, impl=impl)
        )

    def cost(query, key, value, backward):
        from . import cost

        return cost.shared_cross_attention(query, key, value, key_lengths=lengths, backward=backward)

    leaves = query, key, value
    matmuls = folded(two_matmuls(visible), inputs)
    masked = folded(lambda *qkv: scaled_dot_product_attention(*qkv, attn_mask=visible), inputs)
    return Problem(
        leaves=leaves,
        grads=(grad,),
        ours=ours,
        truth=matmuls,
        cost=cost,
        baselines={
            "eager expanded": lambda: expanded(eager(visible, streams, dtype), leaves, streams),
            "sdpa expanded": lambda: expanded(sdpa(visible, streams), leaves, streams),
            "fold + sdpa" if visible is None else "fold + sdpa, key mask": plain(masked),
            "fold + two matmuls": plain(matmuls),
            "fold + flex, compiled": lambda: flex(leaves, inputs, lengths),
            "fold + varlen_attn": lambda: varlen(leaves, inputs, lengths, backward),
        },
    )


def fold(query, inputs):
    """Returns (b * M, H, t, D) as (b, H, M * t, D): a view of a token-major tensor."""
    return query.transpose(1, 2).unflatten(0, (inputs, -1)).flatten(1, 2).transpose(1, 2)


def folded(attention, inputs):
    """Returns ``attention`` applied to queries folded to (b, H, M * t, D)."""

    def attend(query, key, value):
        streams, heads, tokens, width = query.shape
        out = attention(fold(query, inputs), key, value).transpose(1, 2)
        return out.reshape(streams, tokens, heads, width).transpose(1, 2)

    return attend


def two_matmuls(visible):
    """Two matmuls and a softmax in the dtype."""

    def attention(query, key, value):
        scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3))
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        return torch.matmul(torch.softmax(scores, -1), value)

    return attention


def expanded(attend, leaves, streams) -> Candidate:
    """A candidate on keys and values repeated per stream; gradients of the copies are summed for the check only."""
    query, key, value = leaves

    def restore(results):
        out, *grads = results
        return (out, *grads[:1], *(g.double().unflatten(0, (-1, streams)).sum(1) for g in grads[1:]))

    return Candidate(attend, (query, key.repeat_interleave(streams, 0), value.repeat_interleave(streams, 0)), restore)


def eager(visible, streams, dtype):
    """Attention like transformers' eager_attention_forward: an additive mask, softmax in float32."""
    mask = None
    if visible is not None:
        mask = torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype).repeat_interleave(streams, 0)

    def attend(query, key, value):
        scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, value)

    return attend


def sdpa(visible, streams):
    mask = None if visible is None else visible.repeat_interleave(streams, 0)
    return lambda query, key, value: scaled_dot_product_attention(query, key, value, attn_mask=mask)


def flex(leaves, inputs, lengths) -> Candidate:
    query, key, _ = leaves
    if query.device.type != "cuda":
        raise ValueError("measured on CUDA only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask, rows = None, query.shape[0] // inputs * query.shape[2]
    if lengths is not None:
        mask = create_block_mask(lambda b, h, q, k: k < lengths[b], inputs, None, rows, key.shape[2], device="cuda")
    attention = torch.compile(flex_attention, dynamic=False)
    return Candidate(folded(lambda query, key, value: attention(query, key, value, block_mask=mask), inputs))


def varlen(leaves, inputs, lengths, backward) -> Candidate:
    """A candidate with inputs as sequences of M * t queries: ``seqused_k`` in inference, packed keys in training."""
    query, key, value = leaves
    if query.device.type != "cuda":
        raise ValueError("CUDA only")
    if query.dtype == torch.float32:
        raise ValueError("16-bit types only")
    from torch.nn.attention.varlen import varlen_attn

    device, tokens, n = key.device, query.shape[2], key.shape[2]
    rows = query.shape[0] // inputs * tokens
    packed = backward and lengths is not None
    counts = lengths if packed else torch.full((inputs,), n, device=device)
    cu_rows = torch.arange(inputs + 1, device=device, dtype=torch.int32) * rows
    cu_keys = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    seqused_k = None if packed or lengths is None else lengths.to(torch.int32)
    keep = torch.arange(n, device=device) < counts[:, None]  # [b, n]

    def attend(query, key, value):
        flat = query.transpose(1, 2).flatten(0, 1)  # [N * t, H, D], a view
        out = varlen_attn(flat, key, value, cu_rows, cu_keys, rows, n, seqused_k=seqused_k)
        return out.unflatten(0, (-1, tokens)).transpose(1, 2)

    def restore(results):
        out, *grads = results
        full = [torch.zeros_like(key).transpose(1, 2) for _ in grads[1:]]
        for target, g in zip(full, grads[1:]):
            target[keep] = g
        return (out, *grads[:1], *(x.transpose(1, 2) for x in full))

    return Candidate(attend, (query, *(x.transpose(1, 2)[keep] for x in (key, value))), restore)  # [T_k, H, D]


def shapes(*sizes, **rest):
    return tuple(dict(zip("bMtn", size)) | HEADS | rest for size in sizes)


OPERATORS = {
    "shared_cross_attention": Operator(
        name="shared_cross_attention",
        title="Shared cross-attention",
        about="PiD: all streams of an input read its keys and values, which lie in memory once. b inputs of n keys, M"
        " streams each of t queries, H heads of width D. Ragged: inputs of 50 to 100% of n.",
        published="sdpa expanded",
        shapes=shapes((1, 30, 1, 512), (4, 30, 1, 512), (1, 8, 1, 2048), (4, 30, 16, 512), (8, 5, 64, 1024)),
        quick_shapes=shapes((2, 16, 1, 256), (2, 8, 8, 128)),
        variants=("", "ragged"),
        problem=problem,
    )
}
