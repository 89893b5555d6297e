"""CUDA C++: csrc/cuda/add_layer_norm_inject*."""

import torch

from ..cuda_library import unavailable
from ..special_tokens import cuda as special_tokens

__all__ = ["backward", "forward", "unavailable"]

MAX_WIDTH = 16384  # limit for a row in registers


def forward(x, residual, weight, bias, vectors, slots, adapter_ids, eps, rms, pre, dropout_p, seed, keep):
    if x.shape[2] > MAX_WIDTH:
        raise ValueError(
            f"add_layer_norm_inject: the CUDA kernels take d up to {MAX_WIDTH}, got {x.shape[2]}; impl='triton' takes"
            " more"
        )
    out, total, mean, rstd = torch.ops.peft_kernels.add_layer_norm_inject_cuda.default(
        _dense(x), _dense(residual), weight, bias, vectors, slots, adapter_ids, eps, rms, pre, dropout_p, seed, keep
    )
    return out, total if keep or pre else None, mean if keep and not rms else None, rstd if keep else None


def backward(
    grad, grad_sum, sum, mean, rstd, weight, slots, adapter_ids, adapters, vectors, rms, pre, dropout_p, seed, need_x,
    need_vectors,
):  # fmt: skip
    grad_x = grad_vectors = grad_slots = None
    from_rows = need_vectors and pre
    if need_x or from_rows:
        grad_sum = grad_sum if grad_sum is None else _dense(grad_sum)
        grad_x, grad_slots = torch.ops.peft_kernels.add_layer_norm_inject_backward_cuda.default(
            _dense(grad), grad_sum, sum.contiguous(), mean, rstd, weight, slots, need_x, from_rows
        )
    if need_vectors:
        rows = grad_slots if pre else grad
        grad_vectors = special_tokens.backward(
            rows, slots, adapters, vectors, dropout_p, seed, adapter_ids, length=sum.shape[1] if pre else None
        )
    return grad_x if need_x else None, grad_vectors


def _dense(x):
    return x if x.stride(2) == 1 else x.contiguous()
