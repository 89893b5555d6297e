"""Y-Tuning (arXiv 2202.09817): trained label representations attend to frozen features, which are computed once.

Importing this package registers the model with ``AutoConfig`` and ``AutoModelForSequenceClassification``.

The paper has no public code. Where it leaves a choice, this implementation uses the following: slots, one for the task
and then one for each label, are free vectors; a block is post-norm, with self-attention, cross-attention and a
feed-forward part; a label's score is the inner product of the final states of its slot and of the task's slot; the
triplet loss is the sum of the hinges over all wrong labels.
"""

from ..hf.extra import needed_by

with needed_by("ytuning"):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from .cache import cache_features
    from .config import YTuningConfig
    from .dataset import CachedFeatures, FeatureCollator
    from .model import YTuningForSequenceClassification

AutoConfig.register(YTuningConfig.model_type, YTuningConfig, exist_ok=True)
AutoModelForSequenceClassification.register(YTuningConfig, YTuningForSequenceClassification, exist_ok=True)

__all__ = ["CachedFeatures", "FeatureCollator", "YTuningConfig", "YTuningForSequenceClassification", "cache_features"]
