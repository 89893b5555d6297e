"""C++ for the CPU: csrc/cpu/special_tokens*."""

import torch

from ..native_library import unavailable

__all__ = ["add_", "backward", "slots", "unavailable"]


def slots(input_ids, special_ids, attention_mask, max_slots):
    mask = None if attention_mask is None else attention_mask != 0
    return torch.ops.peft_kernels.special_token_slots_cpu.default(input_ids, special_ids, mask, max_slots)


def add_(hidden, vectors, slots, dropout_p, seed, adapter_ids):
    dense = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    torch.ops.peft_kernels.special_token_add_cpu.default(
        dense, vectors.contiguous(), slots, dropout_p, seed, adapter_ids
    )
    if dense is not hidden:
        hidden.copy_(dense)


def backward(grad, slots, adapters, vectors, dropout_p, seed, adapter_ids):
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    return torch.ops.peft_kernels.special_token_add_backward_cpu.default(
        grad, slots, adapters, vectors, dropout_p, seed, adapter_ids
    )
