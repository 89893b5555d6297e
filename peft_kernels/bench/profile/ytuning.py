"""Y-Tuning: full fine-tuning against label blocks on features that are computed once."""

import copy
from collections.abc import Iterator

import torch

from ...ytuning import YTuningConfig, YTuningForSequenceClassification
from .. import methods
from .case import OURS, STOCK, Agreement, Case, close, difference, evaluating, training_step, without_gradient
from .models import check_length
from .tokens import random_ids

UNCACHED = "ours, not cached"


class YTuning:
    kinds = ("encoder",)
    trains = True
    sizes = {"batch": 32, "length": 128}
    quick = {"batch": 4, "length": 32}

    def __init__(self, source, train: bool, largest: dict[str, int]):
        self.train, self.dtype = train, source.dtype
        self.stock = source.classifier()
        self.backbone = (copy.deepcopy(self.stock) if train else methods.twin(self.stock)).base_model.requires_grad_(False)
        check_length(self.backbone, largest["length"])
        width, heads = self.stock.config.hidden_size, self.stock.config.num_attention_heads
        torch.manual_seed(0)
        config = YTuningConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=width, num_labels=2)
        self.model = YTuningForSequenceClassification(config).to(source.device, source.dtype).eval()
        self.model.set_backbone(self.backbone)
        if train:
            self.ways = {
                STOCK: "full fine-tuning: forward, backward and AdamW on all weights",
                OURS: "a label block on features in memory, computed before",
                UNCACHED: "the same, the frozen backbone run in every step",
            }
        else:
            self.ways = {STOCK: "the model with a classification head", OURS: "the same backbone with a label block"}

    def cases(self, point: dict[str, int]) -> Iterator[Case]:
        batch, length = point["batch"], point["length"]
        ids = random_ids(batch, length, vocab_size=self.stock.get_input_embeddings().num_embeddings, avoid=self.stock.config.pad_token_id)
        ids = ids.to(self.stock.device)
        mask, labels = torch.ones_like(ids), torch.arange(batch, device=ids.device) % 2
        tokens = {"input_ids": ids, "attention_mask": mask}

        def cached():
            return {"features": without_gradient(lambda: self.backbone(**tokens).last_hidden_state)(), "attention_mask": mask}

        def run_of(model, inputs):
            if self.train:
                return training_step(model, lambda: model(**inputs, labels=labels).loss)
            return without_gradient(lambda: model(**inputs).logits)

        def check(outputs) -> Agreement:
            with evaluating((self.model,)):
                return close(self.dtype, {"logits, cached and not": difference(self.model(**cached()).logits, self.model(**tokens).logits)})

        if self.train:
            ways = {
                STOCK: lambda: run_of(self.stock, tokens),
                OURS: lambda: run_of(self.model, cached()),
                UNCACHED: lambda: run_of(self.model, tokens),
            }
        else:
            ways = {STOCK: lambda: run_of(self.stock, tokens), OURS: lambda: run_of(self.model, tokens)}
        yield Case("training step" if self.train else "forward", point, batch, "samples", ways, check)
