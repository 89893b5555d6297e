"""``YTuningConfig``."""

from typing import Any

from transformers import PreTrainedConfig

LOSSES = ("triplet", "cross_entropy")
PROBLEMS = (None, "single_label_classification")


class YTuningConfig(PreTrainedConfig):
    """Configuration of Y-Tuning (arXiv 2202.09817); ``num_labels`` as in every transformers configuration.

    Attributes:
        hidden_size: d, the width of the features and of the label blocks.
        num_blocks: number of label blocks, at least one.
        num_attention_heads: heads of self-attention and cross-attention; divides ``hidden_size``.
        intermediate_size: width of a block's feed-forward part.
        hidden_dropout_prob: dropout of each part of a block before its residual add.
        loss: ``"triplet"``, the sum over wrong labels c of ``max(0, margin + t_c - t_y)``, or ``"cross_entropy"``; the
            mean over rows.
        margin: margin of the triplet loss.
        backbone: name or folder of the frozen model that computes features from ``input_ids``; None: the model takes
            only ``features``.
        backbone_layer: index of the features in the backbone's ``hidden_states``; -1: the last.
        initializer_range: standard deviation of the initial matrices. Slots start from N(0, 1), the scale of a
            LayerNorm's output.
        layer_norm_eps: eps of every LayerNorm.

    Raises:
        ValueError: a value is out of range.
    """

    model_type = "ytuning"

    hidden_size: int = 768
    num_blocks: int = 1
    num_attention_heads: int = 12
    intermediate_size: int = 768
    hidden_dropout_prob: float | int = 0.1
    loss: str = "triplet"
    margin: float | int = 1.0
    backbone: str | None = None
    backbone_layer: int = -1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("hidden_size", "num_blocks", "num_attention_heads", "intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"YTuningConfig: {name} must be an integer of at least 1, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"YTuningConfig: num_attention_heads must divide hidden_size = {self.hidden_size}, got"
                f" {self.num_attention_heads}"
            )
        if not 0 <= self.hidden_dropout_prob < 1:
            raise ValueError(f"YTuningConfig: hidden_dropout_prob must lie in [0, 1), got {self.hidden_dropout_prob!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"YTuningConfig: loss must be one of {LOSSES}, got {self.loss!r}")
        if self.problem_type not in PROBLEMS:
            raise ValueError(
                f"YTuningConfig: problem_type must be one of {PROBLEMS}, got {self.problem_type!r}: a text has one"
                " label"
            )
        if self.margin <= 0:
            raise ValueError(f"YTuningConfig: margin must be positive, got {self.margin!r}")
