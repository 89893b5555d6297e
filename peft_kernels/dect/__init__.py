"""Decoder tuning (DecT, arXiv 2212.08408): a classifier on what a frozen model says at one mask, trained in milliseconds."""

from ..hf.extra import needed_by

with needed_by("dect"):
    from .classifier import DecoderTuning
    from .extraction import Extraction, extract
    from .model import DecTConfig, DecTForSequenceClassification

__all__ = ["DecTConfig", "DecTForSequenceClassification", "DecoderTuning", "Extraction", "extract"]
