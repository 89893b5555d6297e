"""``YTuningForSequenceClassification``: label blocks over frozen features."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from ..hf.frozen import check_labels, padded_behind
from ..ops import label_cross_attention
from .backbone import FrozenBackbone, right_padded
from .config import PROBLEMS, YTuningConfig

__all__ = ["YTuningForSequenceClassification", "triplet_loss"]


class SelfAttention(nn.Module):
    """Self-attention among slots (S, d) or (B, S, d)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, slots):
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for x in self.qkv(slots).chunk(3, -1))
        return self.output(scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class Projection(nn.Linear):
    """A weight that is read by a call, so that hooks of accelerate and FSDP can load it."""

    def __init__(self, width: int):
        super().__init__(width, width, bias=False)

    def forward(self):
        return self.weight


class CrossAttention(nn.Module):
    """Cross-attention from slots to features (B, n, d)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (Projection(config.hidden_size) for _ in range(3))
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, slots, features, lengths):
        weights = self.query(), self.key(), self.value()
        # the operator accumulates in float32 and takes features in their stored dtype
        with torch.autocast(features.device.type, enabled=False):
            states = label_cross_attention(
                slots.to(weights[0].dtype), features, *weights, lengths=lengths, num_heads=self.heads
            )
        return self.output(states)


class LabelBlock(nn.Module):
    """Post-norm block: self-attention among slots, cross-attention to features, feed-forward."""

    def __init__(self, config):
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.cross_attention = CrossAttention(config)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(3))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, slots, features, lengths):
        """Update slots (S, d) or (B, S, d); returns (B, S, d)."""
        slots = self.norms[0](slots + self.dropout(self.self_attention(slots)))
        slots = self.norms[1](slots + self.dropout(self.cross_attention(slots, features, lengths)))
        return self.norms[2](slots + self.dropout(self.down(gelu(self.up(slots)))))


class YTuningForSequenceClassification(PreTrainedModel):
    """Y-Tuning (arXiv 2202.09817): a slot for the task and one for each label attend to the features of a frozen model.

    Takes ``features``, or ``input_ids`` for the backbone that ``config.backbone`` names. The backbone is loaded on
    first use, stays frozen and in eval mode, and is not part of ``parameters``, ``state_dict`` or ``save_pretrained``:
    a checkpoint holds the label blocks, and its config names the backbone. ``set_backbone`` sets one that is already in
    memory.
    """

    config_class = YTuningConfig
    base_model_prefix = "ytuning"
    main_input_name = "features"

    def __init__(self, config: YTuningConfig) -> None:
        super().__init__(config)
        self.slots = nn.Parameter(torch.empty(1 + cast(int, config.num_labels), config.hidden_size))
        self.blocks = nn.ModuleList(LabelBlock(config) for _ in range(config.num_blocks))
        self.frozen_backbone = FrozenBackbone(config.backbone)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            init.normal_(self.slots, mean=0.0, std=1.0)

    def set_backbone(self, model: nn.Module) -> None:
        """Freeze ``model``, put it in eval mode, and use it as the backbone."""
        self.frozen_backbone.set(model)

    def forward(
        self,
        features: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Classify texts from their features or their token ids.

        Args:
            features: (B, n, d), of any floating-point dtype; None: computed from ``input_ids``.
            lengths: (B,), number of features of each text, if they are padded on the right; or ``attention_mask``.
            attention_mask: (B, n), 1 at tokens and 0 at padding on either side.
            input_ids: (B, n), for the backbone, with ``token_type_ids`` if it takes them.
            labels: (B,) integers in [0, num_labels).

        Returns:
            ``logits`` (B, num_labels), inner products of the final states of task and label, and ``loss`` if ``labels``
            are given.

        Raises:
            ValueError: none or both of ``features`` and ``input_ids`` are given, or both of ``lengths`` and
                ``attention_mask``; features have another width; a label is not a class index; or the loss is for
                regression, several labels per text or one class.
        """
        if (features is None) == (input_ids is None):
            raise ValueError(
                "YTuningForSequenceClassification: pass features or input_ids, got"
                f" {'none' if features is None else 'both'}"
            )
        if lengths is not None and attention_mask is not None:
            raise ValueError("YTuningForSequenceClassification: pass lengths or attention_mask, got both")
        if features is None:
            if attention_mask is not None:  # pad as ``cache_features`` does
                attention_mask, input_ids, token_type_ids = padded_behind(attention_mask, input_ids, token_type_ids)
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            features = self.frozen_backbone(self.config.backbone_layer, **inputs)
        if features.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"YTuningForSequenceClassification: features must be (B, n, {self.config.hidden_size}), got"
                f" {tuple(features.shape)}"
            )
        if attention_mask is not None:
            features, lengths = right_padded(features, attention_mask)
        if features.dtype != self.dtype and self.dtype != torch.float32:
            features = features.to(self.dtype)
        states = self.slots
        for block in self.blocks:
            states = block(states, features, lengths)
        logits = (states[:, 1:] @ states[:, 0, :, None]).squeeze(-1)  # (B, C)
        loss = None if labels is None else self._loss(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if return_dict is None or return_dict else output.to_tuple()

    def _loss(self, logits, labels):
        name = "YTuningForSequenceClassification"
        if self.config.num_labels < 2 or self.config.problem_type not in PROBLEMS:
            raise ValueError(
                f"{name}: a loss needs num_labels of at least 2 and problem_type 'single_label_classification',"
                f" got {self.config.num_labels} and {self.config.problem_type!r}"
            )
        labels = check_labels(name, labels, *logits.shape)
        if self.config.loss == "triplet":
            return triplet_loss(logits, labels, self.config.margin)
        return cross_entropy(logits, labels)


def triplet_loss(scores: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The mean over rows of ``scores`` (B, C) of the sum over ``c != y`` of ``max(0, margin + t_c - t_y)``."""
    target_scores = scores.gather(1, labels[:, None])
    hinges = (margin + scores - target_scores).relu()
    return hinges.scatter(1, labels[:, None], 0).sum(1).mean()
