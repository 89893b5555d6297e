"""Prompt-in-Decoder (arXiv 2403.13112): encode an input once, decode many prompts on shared keys and values."""

from ..hf.extra import needed_by

with needed_by("pid"):
    from .prompts import PiDOutput, forward, generate
    from .swap import disable, enable, is_enabled
    from .warmup import warmup

__all__ = ["PiDOutput", "disable", "enable", "forward", "generate", "is_enabled", "warmup"]
