"""The native library of the CPU, loaded once for every operator."""

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_native.so"
DTYPES = (torch.float32, torch.bfloat16)


def not_built(library: Path, needs: str) -> str | None:
    """Returns why a library is missing, as its build noted, and the command that builds it; None if it exists."""
    if library.exists():
        return None
    note = library.with_suffix(".txt")
    reason = f" ({note.read_text(encoding='utf-8')})" if note.exists() else ""
    return f"is not built{reason}: with {needs}, in the folder of the sources, pip install --no-build-isolation ."


@cache
def load_error() -> str | None:
    """Loads the library; returns why it cannot be used, or None."""
    if reason := not_built(LIBRARY, "torch, setuptools 77 or newer and a C++ compiler"):
        return f"the native library {reason}"
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
    return load_error()
