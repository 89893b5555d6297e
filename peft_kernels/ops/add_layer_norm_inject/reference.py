"""The reference in plain PyTorch, which tests compare with. Any device, any dtype."""

import torch
from torch import Tensor

from ..special_tokens import reference as special_tokens


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    return None


def forward(x, residual, weight, bias, vectors, slots, adapter_ids, eps, rms, pre, dropout_p, seed, keep):
    injection = None if vectors is None else special_tokens.injected(vectors, slots, dropout_p, seed, adapter_ids)
    total = x.to(weight.dtype) + residual.to(weight.dtype)
    if pre:
        total = _inject(total, injection)
    total = total.to(x.dtype)
    wide = total.to(weight.dtype)
    mean = None if rms else wide.mean(-1)
    centred = wide if rms else wide - mean[..., None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    out = centred * rstd[..., None] * weight
    if bias is not None:
        out = out + bias
    if not pre:
        out = _inject(out, injection)
    return out.to(x.dtype), total if keep or pre else None, mean if keep else None, rstd if keep else None


def backward(
    grad, grad_sum, sum, mean, rstd, weight, slots, adapter_ids, adapters, vectors, rms, pre, dropout_p, seed, need_x,
    need_vectors,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    normal = sum.to(weight.dtype) if rms else sum.to(weight.dtype) - mean[..., None]
    normal = normal * rstd[..., None]
    scaled = grad.to(weight.dtype) * weight
    total = scaled - normal * (scaled * normal).mean(-1, keepdim=True)
    if not rms:
        total = total - scaled.mean(-1, keepdim=True)
    total = total * rstd[..., None]
    if grad_sum is not None:
        total = total + grad_sum.to(weight.dtype)
    grad_vectors = None
    if need_vectors:
        grad_vectors = special_tokens.backward(
            total if pre else grad, slots, adapters, vectors, dropout_p, seed, adapter_ids
        )
    return total.to(grad.dtype) if need_x else None, grad_vectors


def _inject(total, injection):
    if injection is None:
        return total
    rows, positions, added = injection
    return total.index_put((rows, positions), added, accumulate=True)
