"""C++ for the CPU: csrc/cpu/prototype_scores*."""

import torch

from ..native_library import load_error

__all__ = ["backward", "cross_entropy", "forward", "unavailable"]


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"its kernels run on the CPU, not on {device}"
    if dtype != torch.float32:
        return f"its kernels take torch.float32, not {dtype}"
    return load_error()


def forward(projected, prototypes, radius, scores, weight):
    return torch.ops.peft_kernels.prototype_scores_cpu.default(projected, prototypes, radius, scores, weight)


def backward(grad, projected, prototypes):
    return torch.ops.peft_kernels.prototype_scores_backward_cpu.default(grad, projected, prototypes)


def cross_entropy(projected, prototypes, radius, scores, weight, labels):
    return torch.ops.peft_kernels.prototype_cross_entropy_cpu.default(
        projected, prototypes, radius, scores, weight, labels
    )
