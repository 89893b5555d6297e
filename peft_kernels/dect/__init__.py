"""Decoder tuning (DecT, arXiv 2212.08408): a classifier on a frozen model's outputs at one mask."""

from ..hf.extra import needed_by

with needed_by("dect"):
    from .classifier import DecoderTuning
    from .extraction import Extraction, extract
    from .model import DecTConfig, DecTForSequenceClassification

__all__ = ["DecTConfig", "DecTForSequenceClassification", "DecoderTuning", "Extraction", "extract"]
