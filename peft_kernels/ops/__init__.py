"""Operators: tensors in, tensors out. They know no model."""

from .shared_cross_attention import shared_cross_attention

__all__ = ["shared_cross_attention"]
