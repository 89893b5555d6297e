"""C++ for the CPU: csrc/cpu/decomposed_prompt_embedding*."""

import torch
from torch.nn.functional import pad

from ..native_library import unavailable

__all__ = ["backward", "backward_low_rank", "forward", "unavailable"]

COLUMN_MULTIPLE = 16  # b is padded to it: kColumnMultiple in csrc/cpu/decomposed_prompt_embedding.h
MAX_RANK = 512  # limit of backward_low_rank: kMaxRank in the same file


def forward(input_ids, weight, prompt, a, b, delta, scale, embed_scale, offsets, insert_after_first, adapter_ids):
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    prompt, a, b, delta = (x if x is None else x.contiguous() for x in (prompt, a, b, delta))
    if b is not None and b.shape[2] % COLUMN_MULTIPLE:
        b = pad(b, (0, -b.shape[2] % COLUMN_MULTIPLE))
    return torch.ops.peft_kernels.decomposed_prompt_embedding_cpu.default(
        input_ids, weight, prompt, a, b, delta, scale, embed_scale, offsets, insert_after_first, adapter_ids
    )


def backward(grad, adapters, virtual, positions, offsets, insert_after_first, adapter_ids, need_prompt, need_delta):
    grad_prompt, _, _, grad_delta = torch.ops.peft_kernels.decomposed_prompt_embedding_backward_cpu.default(
        _dense(grad), adapters, virtual, positions, 0, None, None, 0.0, offsets, insert_after_first, adapter_ids,
        need_prompt, need_delta,
    )  # fmt: skip
    return grad_prompt if need_prompt else None, grad_delta if need_delta else None


def backward_low_rank(
    grad, adapters, virtual, positions, a, b, scale, offsets, insert_after_first, adapter_ids, need_prompt
):
    """Returns the gradients of prompt, a and b; passing a requests the gradient of b, and passing b that of a."""
    rank = b.shape[1] if a is None else a.shape[2]
    a = None if a is None else a.contiguous()
    transposed = None if b is None else pad(b, (0, 0, 0, -rank % COLUMN_MULTIPLE)).mT.contiguous()
    grad_prompt, grad_a, grad_b, _ = torch.ops.peft_kernels.decomposed_prompt_embedding_backward_cpu.default(
        _dense(grad), adapters, virtual, positions, rank, a, transposed, scale, offsets, insert_after_first,
        adapter_ids, need_prompt, False,
    )  # fmt: skip
    return grad_prompt if need_prompt else None, None if b is None else grad_a, None if a is None else grad_b


def _dense(grad):
    return grad if grad.stride(2) == 1 else grad.contiguous()
