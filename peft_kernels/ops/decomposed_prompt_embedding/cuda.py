"""CUDA C++: csrc/cuda/decomposed_prompt_embedding*."""

import torch

from ..cuda_library import unavailable

__all__ = ["backward", "forward", "unavailable"]


def forward(input_ids, weight, prompt, a, b, delta, scale, embed_scale, offsets, insert_after_first, adapter_ids):
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    prompt, a, b, delta = (x if x is None else x.contiguous() for x in (prompt, a, b, delta))
    return torch.ops.peft_kernels.decomposed_prompt_embedding_cuda.default(
        input_ids, weight, prompt, a, b, delta, scale, embed_scale, offsets, insert_after_first, adapter_ids
    )


def backward(grad, adapters, virtual, positions, offsets, insert_after_first, adapter_ids, need_prompt, need_delta):
    if grad.stride(2) != 1:
        grad = grad.contiguous()
    grads = torch.ops.peft_kernels.decomposed_prompt_embedding_backward_cuda.default(
        grad, adapters, virtual, positions, offsets, insert_after_first, adapter_ids, need_prompt, need_delta
    )
    return tuple(g if needed else None for g, needed in zip(grads, (need_prompt, need_delta)))
