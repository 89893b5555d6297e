"""Inputs of ``shared_cross_attention``, and its formula."""

from functools import partial

import torch
from accuracy import assert_within_rounding

from peft_kernels.ops import shared_cross_attention

IMPLS = ["reference", "sdpa", "matmul", "auto"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (streams, inputs, heads, tokens, keys, width), key_lengths, encoder_index
CASES = {
    "uniform": ((6, 2, 3, 5, 17, 16), None, None),
    "decode": ((30, 1, 2, 1, 67, 64), None, None),
    "one-of-all": ((1, 1, 1, 1, 1, 1), None, None),
    "lengths": ((6, 3, 2, 3, 13, 24), [13, 0, 5], None),
    "all-empty": ((4, 2, 2, 3, 7, 16), [0, 0], None),
    "ragged": ((7, 4, 2, 3, 19, 80), None, [0, 0, 0, 1, 3, 3, 3]),
    "ragged-lengths": ((7, 6, 2, 4, 23, 24), [23, 7, 0, 11, 1, 23], [1, 1, 2, 3, 4, 4, 4]),
    "wide": ((4, 2, 2, 7, 31, 256), [31, 12], None),
}


def make(case, dtype=torch.float32, device="cpu", seed=0):
    (streams, inputs, heads, tokens, keys, width), lengths, index = case
    generator = torch.Generator().manual_seed(seed)
    shapes = ((streams, heads, tokens, width), (inputs, heads, keys, width), (inputs, heads, keys, width))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    where = {"key_lengths": lengths, "encoder_index": index}
    where = {
        name: None if x is None else torch.tensor(x, dtype=torch.int32, device=device) for name, x in where.items()
    }
    for key_or_value in tensors[1:]:
        for i, length in enumerate(lengths or []):
            key_or_value[i, :, length:] = torch.nan
    return tensors, where


def by_hand(query, key, value, *, key_lengths=None, encoder_index=None, scale=None):
    """Softmax attention, one stream at a time; autograd computes the gradients."""
    per_input = query.shape[0] // max(key.shape[0], 1)
    outs, lses = [], []
    for u, q in enumerate(query):
        i = u // per_input if encoder_index is None else int(encoder_index[u])
        length = key.shape[2] if key_lengths is None else int(key_lengths[i])
        scores = q @ key[i, :, :length].mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        lses.append(scores.logsumexp(-1, keepdim=True))
        # softmax's own backward over one key is exact: no measure of rounding
        outs.append((scores - lses[-1]).exp() @ value[i, :, :length])
    return torch.stack(outs), torch.stack(lses).squeeze(-1)


def results(attend, tensors, grads, **where):
    """Output, log-sum-exp, and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attend(*leaves, **where)
    given = [(x, g.to(x.dtype)) for x, g in zip((out, lse), grads) if g is not None]
    torch.autograd.backward(*zip(*given))
    return [out.detach(), lse.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def assert_no_worse_than_plain(attend, tensors, where, grads, **options):
    """Assert equality within rounding of plain PyTorch in the same dtype."""
    exact = results(by_hand, [x.double() for x in tensors], grads, **where, **options)
    got = results(attend, tensors, grads, **where, **options)
    assert_within_rounding(got, lambda: results(by_hand, tensors, grads, **where, **options), exact)


def grads_of(query, through_lse=True, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = (query.shape, query.shape[:3] if through_lse else None)
    return [
        None if s is None else torch.randn(s, generator=generator, dtype=torch.float64).to(query.device) for s in shapes
    ]


def attention(impl):
    return partial(shared_cross_attention, return_lse=True, impl=impl)
