"""C++ for the CPU: csrc/cpu/label_logits*."""

import torch

from ..native_library import unavailable

__all__ = ["backward", "forward", "unavailable"]


def forward(hidden, weight, label_ids, bias, positions):
    weight, label_ids, bias = _dense(weight, label_ids, bias)
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    return torch.ops.peft_kernels.label_logits_cpu.default(hidden, weight, label_ids, bias, positions)


def backward(grad_words, weight, label_ids):
    weight, label_ids, _ = _dense(weight, label_ids, None)
    return torch.ops.peft_kernels.label_logits_backward_cpu.default(grad_words.contiguous(), weight, label_ids)


def _dense(weight, label_ids, bias):
    """Returns a table with dense rows, and the ids and biases for it.

    If the rows are not dense, only the needed ones are copied, because the table has the vocabulary's size.
    """
    if weight.stride(1) == 1:
        return weight, label_ids, bias
    ids = label_ids.flatten().clamp_min(0)
    rows = torch.arange(ids.numel(), device=ids.device).view(label_ids.shape).masked_fill(label_ids < 0, -1)
    return weight[ids].contiguous(), rows, None if bias is None else bias[ids]
