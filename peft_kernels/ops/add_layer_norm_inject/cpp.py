"""C++ for the CPU: csrc/cpu/add_layer_norm_inject*."""

import torch

from ..native_library import unavailable

__all__ = ["backward", "forward", "unavailable"]


def forward(x, residual, weight, bias, vectors, slots, adapter_ids, eps, rms, pre, dropout_p, seed, keep):
    out, sum, mean, rstd = torch.ops.peft_kernels.add_layer_norm_inject_cpu.default(
        _dense(x), _dense(residual), weight, bias, vectors, slots, adapter_ids, eps, rms, pre, dropout_p, seed, keep
    )
    return out, sum if keep or pre else None, mean if keep and not rms else None, rstd if keep else None


def backward(
    grad, grad_sum, sum, mean, rstd, weight, slots, adapter_ids, adapters, vectors, rms, pre, dropout_p, seed, need_x,
    need_vectors,
):  # fmt: skip
    grad = _dense(grad)
    grad_x, rows, columns = None, grad, slots
    if need_x or (pre and need_vectors):
        injects = pre and need_vectors
        grad_x, injected = torch.ops.peft_kernels.add_layer_norm_inject_backward_cpu.default(
            grad,
            None if grad_sum is None else _dense(grad_sum),
            sum,
            mean,
            rstd,
            weight,
            slots if injects else None,
            adapter_ids,
            adapters,
        )
        if injects:  # only the rows of special tokens, packed
            rows, columns = injected, torch.arange(slots.shape[1]).expand(slots.shape).masked_fill(slots < 0, -1)
    grad_vectors = None
    if need_vectors:
        grad_vectors = torch.ops.peft_kernels.special_token_add_backward_cpu.default(
            rows, columns, adapters, vectors, dropout_p, seed, adapter_ids
        )
    return grad_x if need_x else None, grad_vectors


def _dense(x):
    return x if x.stride(2) == 1 else x.contiguous()
