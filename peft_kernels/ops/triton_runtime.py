"""Shared code of the launchers of all Triton kernels: whether kernels run here, layouts, grids."""

import os
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INSTALLED = find_spec("triton") is not None
INTERPRETED_DTYPES = (torch.float32, torch.float16)  # the interpreter's arithmetic is wrong in bfloat16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is decorated, on import
COMPILER_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}
MAX_PROGRAMS = 512  # a sum over the batch is split into parts, which need a second sum, up to this many programs
MIN_ADDENDS = 32  # per part


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    if not INSTALLED:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"its kernels are for float32, float16 and bfloat16, not {dtype}"
    if device == "cpu" and not INTERPRETED:
        return "on a CPU it runs only in Triton's interpreter, with TRITON_INTERPRET=1 set before the first call"
    if device == "cpu" and dtype not in INTERPRETED_DTYPES:
        return "the arithmetic of Triton's interpreter is wrong in bfloat16"
    if device not in ("cpu", "cuda"):
        return f"its kernels are for CUDA and ROCm devices, not {device}"
    return None


def kernel_module(package: str | None, name: str = "triton_kernels") -> ModuleType | None:
    """Returns the module of ``package`` with its kernels, or None without Triton."""
    try:
        return import_module(f".{name}", package)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None


@cache
def device_of(device: torch.device) -> tuple[str, int]:
    """Returns the architecture whose configs fit the device, and its number of SMs (CUs on AMD)."""
    if device.type == "cpu":
        return "sm_80", 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        family = "gfx942"
    else:
        family = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
    return family, properties.multi_processor_count


def guard(device: torch.device):
    """Makes ``device`` current for a launch: Triton launches on the current device, whatever that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Returns contiguous tensors, for kernels that take no strides for them."""
    return [x if x is None else x.contiguous() for x in tensors]


def dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if x is None else x.stride()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def partition(batch: int, addends_per_row: int, programs: int) -> tuple[int, int]:
    """Returns the number of parts of the batch and the rows per part.

    Both, and therefore the order of a sum, depend on sizes alone.
    """
    parts = max(1, min(batch * addends_per_row // MIN_ADDENDS, MAX_PROGRAMS // max(programs, 1), batch))
    rows = max(1, cdiv(batch, parts))
    return max(1, cdiv(batch, rows)), rows
