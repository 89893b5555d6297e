"""Benchmarks of label cross-attention over frozen features, against keys and values with scaled_dot_product_attention.

Slots and all weights take gradients, features do not. "padded": random lengths from 1 to n.
"""

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from ... import ops
from ..problem import Candidate, Operator, Problem, RandomInputs, plain


def problem(shape, variant, dtype, device, backward) -> Problem:
    batch, n, width, heads, slots = (shape[name] for name in ("B", "n", "d", "num_heads", "S"))
    random = RandomInputs(device, dtype)
    lengths = random.integers(1, n + 1, batch) if variant == "padded" else None
    # [B, 1, 1, n]
    visible = None if lengths is None else (torch.arange(n, device=device) < lengths[:, None])[:, None, None]
    weights = ((random.normal(width, width, dtype=torch.float32) / width**0.5).to(dtype) for _ in range(3))
    features, grad = random.normal(batch, n, width), random.normal(batch, slots, width)

    def arguments(slots, w_q, w_k, w_v):
        weights = {"w_q": w_q, "w_k": w_k, "w_v": w_v}
        return {"slots": slots, "features": features, **weights, "lengths": lengths, "num_heads": heads}

    def ours(impl):
        return Candidate(lambda *leaves: ops.label_cross_attention(**arguments(*leaves), impl=impl))

    def cost(*leaves, backward):
        from . import cost

        return cost.label_cross_attention(**arguments(*leaves), backward=backward)

    return Problem(
        leaves=(random.normal(slots, width), *weights),
        grads=(grad,),
        ours=ours,
        truth=keys_and_values(features.double(), visible, heads),
        cost=cost,
        baselines={
            "keys and values, sdpa": plain(keys_and_values(features, visible, heads)),
            "absorbed, plain PyTorch": plain(absorbed(features, visible, heads)),
        },
    )


def keys_and_values(features, visible, heads):
    def attend(slots, w_q, w_k, w_v):
        q, k, v = (
            linear(x, w).unflatten(-1, (heads, -1)).transpose(-2, -3)
            for x, w in ((slots, w_q), (features, w_k), (features, w_v))
        )
        out = scaled_dot_product_attention(q.expand(len(k), *q.shape), k, v, attn_mask=visible)
        return out.transpose(1, 2).flatten(2)

    return attend


def absorbed(features, visible, heads):
    def attend(slots, w_q, w_k, w_v):
        width = slots.shape[1]
        queries = linear(slots, w_q).unflatten(1, (heads, -1)).transpose(0, 1)
        queries = torch.bmm(queries, w_k.view(heads, -1, width)).flatten(0, 1)  # [H * S, d]
        scores = queries @ features.mT * (width // heads) ** -0.5
        if visible is not None:
            scores = scores.masked_fill(~visible[:, 0], -torch.inf)
        pooled = torch.bmm(scores.softmax(-1), features).unflatten(1, (heads, -1))
        return torch.einsum("bhsd,hed->bshe", pooled, w_v.view(heads, -1, width)).flatten(2)

    return attend


def shapes(*sizes):
    return tuple(dict(zip(("B", "n", "d", "num_heads", "S"), size)) for size in sizes)


OPERATORS = {
    "label_cross_attention": Operator(
        name="label_cross_attention",
        title="Label cross-attention",
        about="Y-Tuning: S label slots attend to the n frozen features of B rows of width d. Padded: rows of different"
        " length.",
        published="keys and values, sdpa",
        shapes=shapes((32, 128, 1024, 16, 3), (32, 128, 1024, 16, 9), (32, 128, 384, 12, 3)),
        quick_shapes=shapes((8, 64, 512, 8, 3)),
        variants=("", "padded"),
        problem=problem,
    )
}
