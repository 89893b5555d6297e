"""A trained DecT classifier as an ordinary transformers model for sequence classification."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..hf.frozen import check_labels, frozen_model, padded_behind, strings
from ..hf.peft_method import is_causal
from ..ops import prototype_scores
from .classifier import DecoderTuning
from .extraction import decoder_ids_for, template_for
from .head import calibrated
from .mask_row import MaskRow


class DecTConfig(PreTrainedConfig):
    """Configuration of ``DecTForSequenceClassification``: the backbone, the template and the classifier.

    Args:
        backbone_config: configuration of the frozen model, as a dictionary with its ``model_type``.
        backbone_class: name of the frozen model's class in transformers.
        template: template of the texts, for ``prepare``.
        label_ids: (C, w) ids of the label words, -1: none. None: no scores.
        mask_id: token id of the mask; None: a causal model, which predicts at its last token.
        last_mask: whether the last mask of a text counts, or the first.
        decoder_ids: input ids of T5's decoder.
        dim: as in ``DecoderTuning``.
        calibration: as in ``DecoderTuning``.
        score_weight: as in ``DecoderTuning``.
        kwargs: any argument of ``PreTrainedConfig``.
    """

    model_type = "dect"

    def __init__(
        self,
        backbone_config: dict | None = None,
        backbone_class: str | None = None,
        template: str | None = None,
        label_ids: list[list[int]] | None = None,
        mask_id: int | None = None,
        last_mask: bool = True,
        decoder_ids: list[int] | None = None,
        dim: int = 128,
        calibration: str = "none",
        score_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.backbone_config, self.backbone_class, self.template = backbone_config, backbone_class, template
        self.label_ids, self.mask_id, self.last_mask, self.decoder_ids = label_ids, mask_id, last_mask, decoder_ids
        self.dim, self.calibration, self.score_weight = dim, calibration, score_weight
        super().__init__(**kwargs)


class DecTForSequenceClassification(PreTrainedModel):
    """A frozen backbone with a trained DecT head.

    Its inputs are texts in the template, with the mask, as ``prepare`` returns them. The logits are q of
    ``DecoderTuning``. The model is not trained: create it with ``from_classifier`` or ``from_pretrained``.
    """

    config_class = DecTConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"

    def __init__(self, config: DecTConfig) -> None:
        super().__init__(config)
        if config.backbone_config is None or config.backbone_class is None:
            raise ValueError(
                "DecT: config must have backbone_config and backbone_class, as from_classifier writes them, got None"
            )
        settings = dict(config.backbone_config)
        backbone_config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
        self.backbone = getattr(transformers, config.backbone_class)(backbone_config)
        classes, width = cast(int, config.num_labels), self.backbone.config.hidden_size
        self.projection = nn.Parameter(torch.zeros(config.dim, width))
        self.prototypes = nn.Parameter(torch.zeros(classes, config.dim))
        self.radius = nn.Parameter(torch.zeros(classes))
        self.empty_scores = nn.Parameter(torch.ones(classes))
        self._row = None
        self.post_init()

    @classmethod
    def from_classifier(
        cls,
        classifier: DecoderTuning,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        label_words: Sequence | None,
    ) -> "DecTForSequenceClassification":
        """Build the model from a fitted classifier and the arguments of its ``extract``; ``backbone`` is not copied.

        Raises:
            ValueError: the classifier is not fitted; it was trained with scores and ``label_words`` is None, or the
                reverse; or the backbone could not be loaded again, because it has adapters or its class is not in
                transformers.
        """
        if not hasattr(classifier, "head_") or classifier.takes_scores_ != (label_words is not None):
            raise ValueError(
                "DecT: classifier must be fitted, with scores if there are label_words, without scores otherwise"
            )
        has_adapters = any(isinstance(m, BaseTunerLayer) for m in backbone.modules())
        if frozen_model("DecT", backbone) is not backbone or has_adapters:
            raise ValueError(
                "DecT: backbone must be a model of transformers without adapters, because its configuration does not"
                " hold them: merge or unload them"
            )
        if getattr(transformers, type(backbone).__name__, None) is not type(backbone):
            raise ValueError(
                f"DecT: backbone must be of a class of transformers, got {type(backbone).__name__}, which"
                " from_pretrained does not find"
            )
        parsed = template_for(backbone, tokenizer, template, None)
        label_ids = None if label_words is None else parsed.label_ids(label_words)
        if label_ids is not None and len(label_ids) != len(classifier.classes_):
            raise ValueError(
                f"DecT: label_words must be those of the classifier's {len(classifier.classes_)} classes, got"
                f" {len(label_ids)}"
            )
        if backbone.config.hidden_size != classifier.n_features_in_:
            raise ValueError(
                f"DecT: backbone must be {classifier.n_features_in_} wide as features in fit, got"
                f" {backbone.config.hidden_size}"
            )
        names = [str(x) for x in classifier.classes_.tolist()]
        config = DecTConfig(
            backbone.config.to_dict(),
            type(backbone).__name__,
            template,
            label_ids,
            parsed.mask_id,
            parsed.mask_follows_text,
            decoder_ids_for(backbone, parsed),
            classifier.dim,
            classifier.calibration,
            classifier.score_weight_,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            pad_token_id=backbone.config.pad_token_id,
        )
        with torch.device("meta"):
            model = cls(config)
        model.backbone = backbone
        device = next(backbone.parameters()).device
        for name, value in (*vars(classifier.head_).items(), ("empty_scores", classifier.empty_scores)):
            value = torch.ones(len(names)) if value is None else torch.as_tensor(value, dtype=torch.float32)
            setattr(model, name, nn.Parameter(value.detach().clone().to(device), requires_grad=False))
        return model.eval()

    def prepare(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The texts in the template, cut at the end where they are too long, as input for a tokenizer or a pipeline."""
        texts = strings("DecT", "texts", texts)
        template = template_for(self.backbone, tokenizer, self.config.template, None)
        return [template.fill(text) for text in template.cut(texts)]

    def train(self, mode: bool = True) -> "DecTForSequenceClassification":
        """Set the mode of the model, but keep the backbone in eval mode: dropout would change its features."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Classify texts by the hidden state and logits at their masks.

        Args:
            input_ids: (B, S), with a mask in every row.
            attention_mask: (B, S), 1 at tokens and 0 at padding on either side; None: no padding.
            token_type_ids: ignored, because an input is one text.
            labels: (B,) in [0, num_labels), for a loss without a gradient.

        Returns:
            ``logits`` (B, C), q of ``DecoderTuning``, without a gradient; ``loss`` if ``labels`` are given.

        Raises:
            ValueError: a row has no mask, a label is not a class index, or labels are given in training mode.
        """
        if labels is not None and self.training and torch.is_grad_enabled():
            raise ValueError("DecT: DecTForSequenceClassification is trained by DecoderTuning.fit; use it in eval mode")
        logits = self._logits(input_ids, attention_mask)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, check_labels("DecT", labels, *logits.shape))
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if return_dict is None or return_dict else output.to_tuple()

    @torch.no_grad()
    def _logits(self, input_ids, attention_mask):
        if attention_mask is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            attention_mask = torch.ones_like(input_ids)
        attention_mask, input_ids = padded_behind(attention_mask, input_ids)  # as in ``extract``
        row = self._row
        if row is None or row.model is not self.backbone:
            row = self._row = MaskRow(self.backbone, self.config.label_ids, self.config.decoder_ids)
        features, scores = row(input_ids, attention_mask, self._positions(input_ids, attention_mask))
        with torch.autocast(features.device.type, enabled=False):
            if scores is not None:
                scores = calibrated(scores, self.empty_scores.float(), self.config.calibration)
            head = self.projection.float(), self.prototypes.float(), self.radius.float()
            return prototype_scores(features, *head, scores, weight=self.config.score_weight)

    def _positions(self, input_ids, attention_mask):
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        candidates = attention_mask != 0
        if not candidates.any(1).all():
            raise ValueError(f"DecT: row {int((~candidates.any(1)).nonzero()[0])} is all padding")
        if self.config.mask_id is not None:
            candidates &= input_ids == self.config.mask_id
            if not candidates.any(1).all():
                row = int((~candidates.any(1)).nonzero()[0])
                raise ValueError(
                    f"DecT: row {row} has no mask: texts must be in the template {self.config.template!r}; see prepare"
                )
        if is_causal(self.backbone) or self.config.last_mask:
            return torch.where(candidates, columns, -1).amax(1)
        return torch.where(candidates, columns, len(columns)).amin(1)


AutoConfig.register("dect", DecTConfig, exist_ok=True)
AutoModelForSequenceClassification.register(DecTConfig, DecTForSequenceClassification, exist_ok=True)
