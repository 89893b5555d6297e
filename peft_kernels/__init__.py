"""Fused kernels for parameter-efficient adaptation, and the layer that swaps them into Hugging Face models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .hf.when_imported import register_when_imported
from .version import __version__

if TYPE_CHECKING:
    from . import ops
    from .dept import DePTConfig
    from .pasta import PASTAConfig

__all__ = ["DePTConfig", "PASTAConfig", "__version__", "ops"]


def __getattr__(name: str) -> Any:
    # on demand: these import torch, peft and transformers
    if name == "ops":
        return import_module(".ops", __name__)
    if name == "DePTConfig":
        from .dept import DePTConfig

        return DePTConfig
    if name == "PASTAConfig":
        from .pasta import PASTAConfig

        return PASTAConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_when_imported()
