"""C++ for the CPU: csrc/cpu/shared_cross_attention*."""

from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[2] / "_native.so"
DTYPES = (torch.float32, torch.bfloat16)


def _load() -> str | None:
    """Why the library cannot be used, or None."""
    if not LIBRARY.exists():
        return "the native library is not built: install with a C++ compiler and `pip install --no-build-isolation`"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


_problem = _load()


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"its kernels run on the CPU, not on {device}"
    if dtype not in DTYPES:
        return f"its kernels take {' and '.join(str(x) for x in DTYPES)}, not {dtype}"
    return _problem


def forward(query, key, value, key_lengths, encoder_index, scale, need_lse):
    return torch.ops.peft_kernels.shared_cross_attention_cpu.default(query, key, value, key_lengths, encoder_index, scale)


def backward(grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs):
    gradients = torch.ops.peft_kernels.shared_cross_attention_backward_cpu.default(
        grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs
    )
    return tuple(g if needed else None for g, needed in zip(gradients, needs))
