"""The native library, loaded once for every operator."""

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_native.so"


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
