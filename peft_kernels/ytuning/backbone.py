"""The frozen model that makes features, and what its attention mask says about them."""

import threading

import torch
from torch import Tensor
from transformers import AutoModel

from ..hf.frozen import frozen_model
from ..hf.peft_method import is_encoder_decoder

__all__ = ["FrozenBackbone", "encoder_of", "features_of", "right_padded"]

_loading = threading.Lock()


class FrozenBackbone:
    """No module of the model that uses it: it is neither saved with that model nor trained, and keeps to eval mode.

    It is loaded when first used, and follows the device of its inputs.
    """

    def __init__(self, name: str | None):
        self.name, self.model = name, None

    def set(self, model: torch.nn.Module) -> None:
        model.requires_grad_(False).eval()
        self.model = encoder_of("YTuningForSequenceClassification", model)

    def __call__(self, layer: int, **inputs) -> Tensor:
        if self.model is None:
            if self.name is None:
                raise ValueError("YTuningForSequenceClassification: input_ids need a backbone: name one in the config, or give features")
            with _loading, torch.device("cpu"):
                if self.model is None:
                    self.set(AutoModel.from_pretrained(self.name))
        if self.model.device not in (inputs["input_ids"].device, torch.device("meta")):
            self.model.to(inputs["input_ids"].device)
        return features_of(self.model, layer, **inputs)


def encoder_of(method: str, model: torch.nn.Module) -> torch.nn.Module:
    """What makes features: a model without its head, of an encoder-decoder the encoder.

    Raises:
        TypeError: no model of transformers. ValueError: adapters that work from around the model.
    """
    model = frozen_model(method, model)
    return model.get_encoder() if is_encoder_decoder(model) else model.base_model


@torch.no_grad()
def features_of(model, layer: int, **inputs) -> Tensor:
    """(B, n, d): hidden states number ``layer``."""
    inputs = {name: x for name, x in inputs.items() if x is not None}
    if layer == -1:
        return model(**inputs).last_hidden_state
    return model(**inputs, output_hidden_states=True).hidden_states[layer]


def right_padded(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Features, those that ``mask``, (B, n), shows before all others; and how many there are, (B,). Attention has no order among them."""
    mask = mask.bool()
    lengths = mask.sum(1)
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        order = mask.int().sort(dim=1, descending=True, stable=True).indices
        features = features.gather(1, order[..., None].expand_as(features))
    return features, lengths
