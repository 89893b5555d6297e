"""Decomposed prompt tuning (DePT, arXiv 2309.05173) as a method of PEFT.

Importing this package registers the method: do so before ``PeftModel.from_pretrained`` reads one of its adapters.
"""

from ..peft_method import register
from .checkpoints import convert_official, load_official
from .config import DEPT, DePTConfig
from .model import DePTModel
from .training import param_groups

register(DEPT, DePTConfig, DePTModel)

__all__ = ["DePTConfig", "DePTModel", "convert_official", "load_official", "param_groups"]
