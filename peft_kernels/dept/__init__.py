"""Decomposed prompt tuning (DePT, arXiv 2309.05173) as a method of PEFT.

``import peft_kernels`` is enough for ``PeftModel.from_pretrained`` to load a DePT adapter.
"""

from ..hf.extra import needed_by

with needed_by("dept"):
    from ..hf.peft_method import register
    from .checkpoints import convert_official, load_official
    from .config import DEPT, DePTConfig
    from .model import DePTModel
    from .training import param_groups

register(DEPT, DePTConfig, DePTModel)

__all__ = ["DePTConfig", "DePTModel", "convert_official", "load_official", "param_groups"]
