"""C++ for the CPU: csrc/cpu/label_cross_attention*."""

import torch

from ..native_library import unavailable

__all__ = ["pool", "pool_backward", "unavailable"]


def pool(queries, features, lengths, offsets, scale, keep):
    pooled, weights = torch.ops.peft_kernels.label_cross_attention_cpu.default(
        queries, _dense(features), lengths, offsets, scale, keep
    )
    return pooled, weights if keep else None


def pool_backward(grad_pooled, features, weights, lengths, offsets, scale, shared):
    return torch.ops.peft_kernels.label_cross_attention_backward_cpu.default(
        grad_pooled, _dense(features), weights, lengths, offsets, scale, shared
    )


def _dense(x):
    return x if x.stride(-1) == 1 else x.contiguous()
