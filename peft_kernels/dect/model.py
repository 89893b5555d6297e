"""A trained DecT as an ordinary transformers model for sequence classification."""

from collections.abc import Sequence

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..peft_method import is_causal
from .classifier import DecoderTuning
from .extraction import decoder_ids_for, template_for
from .head import Head, calibrated
from .mask_row import MaskRow


class DecTConfig(PreTrainedConfig):
    """Of the backbone, and what its mask is asked.

    Args:
        backbone_config: of the frozen model, as a dictionary with its ``model_type``.
        backbone_class: its class in transformers.
        template: what texts stand in; kept for ``prepare``.
        label_ids: (C, w) ids of the label words, -1: none. None: no scores.
        mask_id: the mask's token id; None: a causal model, whose last token predicts.
        last_mask: whether the last mask of a text counts, or the first.
        decoder_ids: what the decoder of T5 reads.
        dim, calibration, score_weight: of ``DecoderTuning``.
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
        **kwargs,
    ):
        self.backbone_config, self.backbone_class, self.template = backbone_config, backbone_class, template
        self.label_ids, self.mask_id, self.last_mask, self.decoder_ids = label_ids, mask_id, last_mask, decoder_ids
        self.dim, self.calibration, self.score_weight = dim, calibration, score_weight
        super().__init__(**kwargs)


class DecTForSequenceClassification(PreTrainedModel):
    """The frozen backbone and the trained head: texts must already stand in the template, with their mask; ``prepare`` puts them there.

    Its logits are q of ``DecoderTuning``. Nothing is trained here: it is made by ``from_classifier`` or ``from_pretrained``.
    """

    config_class = DecTConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"

    def __init__(self, config: DecTConfig):
        super().__init__(config)
        settings = dict(config.backbone_config)
        self.backbone = getattr(transformers, config.backbone_class)(CONFIG_MAPPING[settings.pop("model_type")](**settings))
        classes, width = config.num_labels, self.backbone.config.hidden_size
        self.projection = nn.Parameter(torch.zeros(config.dim, width))
        self.prototypes = nn.Parameter(torch.zeros(classes, config.dim))
        self.radius = nn.Parameter(torch.zeros(classes))
        self.empty_scores = nn.Parameter(torch.ones(classes))
        self._row = None
        self.post_init()

    @classmethod
    def from_classifier(
        cls, classifier: DecoderTuning, backbone: PreTrainedModel, tokenizer, template: str, label_words: Sequence | None
    ) -> "DecTForSequenceClassification":
        """Of a fitted classifier and what its features were extracted with. The backbone's weights are shared, not copied.

        Raises:
            ValueError: the classifier is not fitted, or was trained with scores and ``label_words`` is None, or the reverse.
        """
        if not hasattr(classifier, "head_") or classifier.takes_scores_ != (label_words is not None):
            raise ValueError("DecT: classifier must be fitted, with scores where label_words are given and without where they are not")
        filled = template_for(backbone, tokenizer, template, None)
        names = [str(x) for x in classifier.classes_.tolist()]
        config = DecTConfig(
            backbone.config.to_dict(),
            type(backbone).__name__,
            template,
            None if label_words is None else filled.label_ids(label_words),
            filled.mask_id,
            filled.mask_follows_text,
            decoder_ids_for(backbone, filled),
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
            value = torch.ones(config.num_labels) if value is None else torch.as_tensor(value, dtype=torch.float32)
            setattr(model, name, nn.Parameter(value.detach().clone().to(device), requires_grad=False))
        return model.eval()

    def prepare(self, texts: Sequence[str], tokenizer) -> list[str]:
        """The texts in the template, their ends cut where they are too long: what a tokenizer or a pipeline takes."""
        filled = template_for(self.backbone, tokenizer, self.config.template, None)
        return [filled.fill(text) for text in filled.cut(texts)]

    @torch.no_grad()
    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs) -> SequenceClassifierOutput:
        """(B, S) ids with a mask in every row, padded on the right: logits (B, C), without a gradient. Token types are those of one text."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self._row is None:
            self._row = MaskRow(self.backbone, self.config.label_ids, self.config.decoder_ids)
        features, scores = self._row(input_ids, attention_mask, self._positions(input_ids, attention_mask))
        if scores is not None:
            scores = calibrated(scores, self.empty_scores.float(), self.config.calibration)
        head = Head(self.projection.float(), self.prototypes.float(), self.radius.float())
        logits = head(features, scores, self.config.score_weight)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _positions(self, input_ids, attention_mask):
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        seen = attention_mask != 0
        if self.config.mask_id is not None:
            seen &= input_ids == self.config.mask_id
            if not seen.any(1).all():
                row = int((~seen.any(1)).nonzero()[0])
                raise ValueError(f"DecT: row {row} has no mask: texts must stand in the template {self.config.template!r}; see prepare")
        if is_causal(self.backbone) or self.config.last_mask:
            return torch.where(seen, steps, -1).amax(1)
        return torch.where(seen, steps, len(steps)).amin(1)


AutoConfig.register("dect", DecTConfig, exist_ok=True)
AutoModelForSequenceClassification.register(DecTConfig, DecTForSequenceClassification, exist_ok=True)
