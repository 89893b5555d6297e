"""C++ for the CPU: csrc/cpu/shared_cross_attention*."""

import torch

from .. import native_library

DTYPES = (torch.float32, torch.bfloat16)


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"its kernels run on the CPU, not on {device}"
    if dtype not in DTYPES:
        return f"its kernels take {' and '.join(str(x) for x in DTYPES)}, not {dtype}"
    return native_library.problem()


def forward(query, key, value, key_lengths, encoder_index, scale, need_lse):
    return torch.ops.peft_kernels.shared_cross_attention_cpu.default(query, key, value, key_lengths, encoder_index, scale)


def backward(grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs):
    gradients = torch.ops.peft_kernels.shared_cross_attention_backward_cpu.default(
        grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs
    )
    return tuple(g if needed else None for g, needed in zip(gradients, needs))
