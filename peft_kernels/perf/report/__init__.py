"""The result files as one self-contained page, and as the figures of the README and of docs/."""

from .cases import load
from .markdown import updated
from .page import page, picture

__all__ = ["load", "page", "picture", "updated"]
