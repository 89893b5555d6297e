"""Operators: tensors in, tensors out."""

from .decomposed_prompt_embedding import decomposed_prompt_embedding
from .shared_cross_attention import shared_cross_attention

__all__ = ["decomposed_prompt_embedding", "shared_cross_attention"]
