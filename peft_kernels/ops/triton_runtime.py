"""Whether Triton kernels run here; shared by all operators."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is decorated, on import


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Returns contiguous tensors, for kernels that take no strides for them."""
    return [x if x is None else x.contiguous() for x in tensors]


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    if not INSTALLED:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"its kernels are for float32, float16 and bfloat16, not {dtype}"
    if device == "cpu" and not INTERPRETED:
        return "on a CPU it runs only in Triton's interpreter, with TRITON_INTERPRET=1 set before the first call"
    if device == "cpu" and dtype == torch.bfloat16:
        return "the arithmetic of Triton's interpreter is wrong in bfloat16"
    if device not in ("cpu", "cuda"):
        return f"its kernels are for CUDA and ROCm devices, not {device}"
    return None
