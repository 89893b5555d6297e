"""The result files as one self-contained page, and as the figures of the README."""

from .cases import load
from .page import page
from .readme import updated

__all__ = ["load", "page", "updated"]
