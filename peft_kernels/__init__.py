"""Fused kernels for parameter-efficient adaptation, and the layer that swaps them into Hugging Face models."""

from . import ops
from .version import __version__

__all__ = ["DePTConfig", "__version__", "ops"]


def __getattr__(name: str):
    if name == "DePTConfig":  # on demand: it imports peft and transformers
        from .dept import DePTConfig

        return DePTConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
