"""The frozen model that computes features, and the removal of padding between them."""

import threading

import torch
from torch import Tensor
from transformers import AutoModel

from ..hf.frozen import frozen_model
from ..hf.peft_method import is_encoder_decoder

__all__ = ["FrozenBackbone", "encoder_of", "features_of", "right_padded"]

_loading = threading.Lock()


class FrozenBackbone:
    """Holds the backbone outside of the model's modules, so that it is not saved, trained or put in training mode.

    It is loaded on first use and follows the device of its inputs.
    """

    def __init__(self, name: str | None):
        self.name, self.model = name, None

    def set(self, model: torch.nn.Module) -> None:
        model.requires_grad_(False).eval()
        self.model = encoder_of("YTuningForSequenceClassification", model)

    def __call__(self, layer: int, **inputs) -> Tensor:
        if self.model is None:
            if self.name is None:
                raise ValueError(
                    "YTuningForSequenceClassification: input_ids need a backbone: set config.backbone or call"
                    " set_backbone, or pass features"
                )
            with _loading, torch.device("cpu"):
                if self.model is None:
                    self.set(AutoModel.from_pretrained(self.name))
        if self.model.device not in (inputs["input_ids"].device, torch.device("meta")):
            self.model.to(inputs["input_ids"].device)
        return features_of(self.model, layer, **inputs)


def encoder_of(method: str, model: torch.nn.Module) -> torch.nn.Module:
    """The part of ``model`` that computes features: the model without its head, or the encoder of an encoder-decoder.

    Raises:
        TypeError: there is no transformers model.
        ValueError: an adapter works in the wrapper instead of the model.
    """
    model = frozen_model(method, model)
    return model.get_encoder() if is_encoder_decoder(model) else model.base_model


@torch.no_grad()
def features_of(model, layer: int, **inputs) -> Tensor:
    """The element ``layer`` of the hidden states of ``model``, (B, n, d)."""
    inputs = {name: x for name, x in inputs.items() if x is not None}
    if layer == -1:
        return model(**inputs).last_hidden_state
    return model(**inputs, output_hidden_states=True).hidden_states[layer]


def right_padded(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Features with the unmasked features of ``mask`` (B, n) in front, and their number, (B,).

    Attention does not depend on their order.
    """
    mask = mask.bool()
    lengths = mask.sum(1)
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        order = mask.int().sort(dim=1, descending=True, stable=True).indices
        features = features.gather(1, order[..., None].expand_as(features))
    return features, lengths
