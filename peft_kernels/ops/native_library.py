"""The native library of the CPU, loaded once for every operator."""

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_native.so"
DTYPES = (torch.float32, torch.bfloat16)


@cache
def problem() -> str | None:
    """Why the library cannot be used, or None."""
    if not LIBRARY.exists():
        return "the native library is not built: install with a C++ compiler and `pip install --no-build-isolation`"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"its kernels run on the CPU, not on {device}"
    if dtype not in DTYPES:
        return f"its kernels take {' and '.join(str(x) for x in DTYPES)}, not {dtype}"
    return problem()
