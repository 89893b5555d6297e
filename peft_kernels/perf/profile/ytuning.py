"""Y-Tuning: full fine-tuning against label blocks on features that are computed once."""

import copy
from collections.abc import Iterator

import torch

from ...ytuning import YTuningConfig, YTuningForSequenceClassification
from .. import pid_baselines
from ..results import OURS
from .measurement import STOCK, Agreement, Measurement, close, difference, evaluating, run_of
from .models import Source, check_length
from .tokens import random_sentences

UNCACHED = "ours, not cached"


class YTuning:
    kinds = ("encoder",)
    trains = True
    sizes = {"batch": 32, "length": 128}
    quick = {"batch": 4, "length": 32}

    def __init__(self, source: Source, train: bool, largest: dict[str, int]):
        self.train, self.dtype = train, source.dtype
        self.stock = source.classifier()
        check_length(self.stock.base_model, largest["length"])
        # full fine-tuning needs its own weights
        self.backbone = (copy.deepcopy(self.stock) if train else pid_baselines.twin(self.stock)).base_model
        width, heads = self.stock.config.hidden_size, self.stock.config.num_attention_heads
        torch.manual_seed(0)
        config = YTuningConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=width, num_labels=2)
        self.model = YTuningForSequenceClassification(config).to(source.device, source.dtype).eval()
        self.model.set_backbone(self.backbone)
        if train:
            self.candidates = {
                STOCK: "full fine-tuning: forward, backward and AdamW on all weights",
                OURS: "the same on a label block, whose features were computed before and lie in memory",
                UNCACHED: "with the frozen backbone run in every step",
            }
        else:
            self.candidates = {
                STOCK: "the model with a classification head",
                OURS: "the same backbone with a label block",
            }

    def cases(self, point: dict[str, int]) -> Iterator[Measurement]:
        inputs = random_sentences(self.stock, **point)
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        others = {name: inputs[name] for name in ("attention_mask", "labels")}

        def cached():
            with torch.no_grad():
                return {"features": self.backbone(**tokens).last_hidden_state, **others}

        def check(outputs) -> Agreement:
            with evaluating((self.model,)):
                return close(
                    self.dtype,
                    {"logits, cached and not": difference(self.model(**cached()).logits, self.model(**inputs).logits)},
                )

        candidates = {
            STOCK: lambda: run_of(self.stock, inputs, self.train),
            OURS: lambda: run_of(self.model, inputs, self.train),
        }
        if self.train:
            candidates |= {UNCACHED: candidates[OURS], OURS: lambda: run_of(self.model, cached(), True)}
        yield Measurement(
            "training step" if self.train else "forward", point, point["batch"], "samples", candidates, check
        )
