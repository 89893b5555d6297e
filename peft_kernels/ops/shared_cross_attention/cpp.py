"""C++ for the CPU: csrc/cpu/shared_cross_attention*."""

import torch

from ..native_library import unavailable

__all__ = ["backward", "forward", "unavailable"]


def forward(query, key, value, key_lengths, encoder_index, scale, need_lse):
    return torch.ops.peft_kernels.shared_cross_attention_cpu.default(
        query, key, value, key_lengths, encoder_index, scale
    )


def backward(grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs):
    gradients = torch.ops.peft_kernels.shared_cross_attention_backward_cpu.default(
        grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs
    )
    return tuple(g if needed else None for g, needed in zip(gradients, needs))
