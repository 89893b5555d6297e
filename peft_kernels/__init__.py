"""Fused kernels for parameter-efficient adaptation, and the layer that swaps them into Hugging Face models."""

from . import ops
from .version import __version__

__all__ = ["__version__", "ops"]
