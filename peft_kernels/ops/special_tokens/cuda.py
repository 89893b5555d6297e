"""CUDA C++: csrc/cuda/special_tokens*."""

import torch

from ..cuda_library import unavailable

__all__ = ["add_", "backward", "slots", "unavailable"]


def slots(input_ids, special_ids, attention_mask, max_slots):
    return torch.ops.peft_kernels.special_token_slots_cuda.default(input_ids, special_ids, attention_mask, max_slots)


def add_(hidden, vectors, slots, dropout_p, seed, adapter_ids):
    torch.ops.peft_kernels.special_token_add_cuda.default(
        hidden, vectors.contiguous(), slots, dropout_p, seed, adapter_ids
    )


def backward(grad, slots, adapters, vectors, dropout_p, seed, adapter_ids, length=None):
    """Returns the gradient of the vectors. ``length``: S, if grad is (B, k, d), with a row for every slot."""
    if grad.stride(2) != 1:
        grad = grad.contiguous()
    partial = torch.ops.peft_kernels.special_token_add_backward_cuda.default(
        grad, slots, adapters, vectors, length, dropout_p, seed, adapter_ids
    )
    return partial[0] if len(partial) == 1 else partial.sum(0)
