"""The library of CUDA C++ kernels, loaded once for every operator."""

from ctypes import CDLL, c_char_p, c_int
from functools import cache

import torch

from . import native_library

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIBRARY = native_library.LIBRARY.with_name("_native_cuda.so")


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return f"its kernels run on CUDA devices, not on {device}"
    if dtype not in DTYPES:
        return f"its kernels are for float32, float16 and bfloat16, not {dtype}"
    if torch.version.hip:
        return "its kernels are for NVIDIA devices, and this torch is built for ROCm"
    return error()


def error() -> str | None:
    """Returns why the current device cannot use the library, or None."""
    return load_error() or device_error(torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


@cache
def load_error() -> str | None:
    """Loads the library; returns why it cannot be loaded, or None.

    The native CPU library defines its schemas, so it is loaded first.
    """
    if reason := native_library.not_built(LIBRARY, "torch, setuptools 77 or newer, a C++ compiler and nvcc"):
        return f"the CUDA library {reason}"
    if reason := native_library.load_error():
        return reason
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    return None


@cache
def device_error(device: int) -> str | None:
    """Returns why a device does not run the library's kernels, or None. It opens no context on the device."""
    ask = CDLL(str(LIBRARY)).peft_kernels_cuda_device_error
    ask.argtypes, ask.restype = [c_int], c_char_p
    reason = ask(device)
    return None if reason is None else f"device {device} does not run the CUDA library: {reason.decode()}"
