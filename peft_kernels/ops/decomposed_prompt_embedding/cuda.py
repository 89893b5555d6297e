"""CUDA C++: csrc/cuda/decomposed_prompt_embedding*."""

from ctypes import CDLL, c_char_p
from functools import cache
from pathlib import Path

import torch

from .. import native_library

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIBRARY = Path(native_library.__file__).parents[1] / "_native_cuda.so"


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return f"its kernels run on CUDA devices, not on {device}"
    if dtype not in DTYPES:
        return f"its kernels are for float32, float16 and bfloat16, not {dtype}"
    if torch.version.hip:
        return "its kernels are for NVIDIA devices, and this torch is built for ROCm"
    return problem()


@cache
def problem() -> str | None:
    """Why the library cannot be used, or None. Its schemas stand in the native library of the CPU."""
    if not LIBRARY.exists():
        return "the CUDA library is not built: install with nvcc, a C++ compiler and `pip install --no-build-isolation`"
    if reason := native_library.problem():
        return reason
    try:
        torch.ops.load_library(LIBRARY)
        driver = CDLL(str(LIBRARY)).peft_kernels_cuda_problem
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    driver.restype = c_char_p
    reason = driver()
    return None if reason is None else f"the device does not run the CUDA library: {reason.decode()}"


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
