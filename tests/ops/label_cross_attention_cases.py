"""Inputs of ``label_cross_attention``, and its formula."""

import against_reference
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from peft_kernels.ops import label_cross_attention

# (rows, tokens, width, slots, heads), lengths
CASES = {
    "plain": ((3, 7, 32, 3, 4), None),
    "lengths": ((5, 9, 32, 3, 2), [9, 0, 4, 1, 8]),
    "odd width": ((2, 5, 101, 2, 1), [5, 3]),
    "odd head": ((2, 13, 51, 4, 3), None),
    "many queries": ((2, 11, 24, 9, 12), [11, 6]),
    "wide": ((2, 3, 1032, 3, 8), None),
    "long": ((2, 307, 64, 3, 4), [307, 193]),
    "one of all": ((1, 1, 1, 1, 1), None),
    "one row": ((1, 6, 16, 2, 2), None),
    "no token": ((2, 0, 16, 3, 2), None),
    "no row": ((0, 5, 16, 2, 2), None),
    "all empty": ((2, 4, 16, 3, 2), [0, 0]),
}


def make(case, per_row=False, dtype=torch.float32, wide=None, device="cpu"):
    """slots, w_q, w_k, w_v; features, NaN in the padding; lengths and num_heads."""
    (rows, tokens, width, slots, heads), lengths = case
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    features = normal(rows, tokens, width)
    floats = [
        normal(*((rows,) if per_row else ()), slots, width),
        *(normal(width, width) * (1.5 / width**0.5) for _ in range(3)),
    ]
    if lengths is not None:
        lengths = torch.tensor(lengths, device=device)
        features[torch.arange(tokens) >= lengths.cpu()[:, None]] = torch.nan
    floats = [x.to(device, wide or dtype) for x in floats]
    return floats, features.to(device, dtype), {"lengths": lengths, "num_heads": heads}


def ragged(features, lengths, num_heads):
    """The same rows without padding."""
    if lengths is None:
        lengths = torch.full(features.shape[:1], features.shape[1], device=features.device)
    kept = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
    return features[kept], {"offsets": torch.cat((lengths.new_zeros(1), lengths.cumsum(0))), "num_heads": num_heads}


def by_hand(slots, w_q, w_k, w_v, features, *, lengths=None, offsets=None, num_heads):
    """Attention with one matmul each for queries, keys and values, as in the operator: separate rows would be summed in
    another order.
    """
    rows = [x[:k] for x, k in zip(features, lengths)] if lengths is not None else list(features)
    if offsets is not None:
        rows = [features[i:j] for i, j in zip(offsets[:-1], offsets[1:])]
    if not rows:
        return slots.flatten()[:0].view(0, *slots.shape[-2:])
    tokens, query = torch.cat(rows), linear(slots, w_q)
    keys, values = (linear(tokens, w).split([len(row) for row in rows]) for w in (w_k, w_v))
    outs = []
    for i, (key, value) in enumerate(zip(keys, values)):
        of_row = query if slots.ndim == 2 else query[i]
        if not len(key):
            outs.append(of_row * 0)
            continue
        q, k, v = (x.unflatten(1, (num_heads, -1)).transpose(0, 1) for x in (of_row, key, value))
        outs.append(scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
    return torch.stack(outs)


def of(impl):
    def forward(slots, w_q, w_k, w_v, features, **options):
        return label_cross_attention(slots, features, w_q, w_k, w_v, impl=impl, **options)

    return forward


def compare(impl, floats, features, **options):
    """Assert equality within rounding of plain PyTorch in the same dtypes."""
    against_reference.compare(of(impl), by_hand, floats, features, **options)
