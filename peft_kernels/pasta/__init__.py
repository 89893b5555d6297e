"""Special token adaptation (PASTA, arXiv 2210.04382) as a method of PEFT."""

from ..hf.extra import needed_by

with needed_by("pasta"):
    from ..hf.peft_method import register
    from .config import PASTA, PASTAConfig
    from .fusing import fuse, unfuse
    from .model import PASTAModel

register(PASTA, PASTAConfig, PASTAModel)

__all__ = ["PASTAConfig", "PASTAModel", "fuse", "unfuse"]
