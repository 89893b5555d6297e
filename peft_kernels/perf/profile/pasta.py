"""Special token adaptation: the stock model against one with vectors, unfused and with fused norms."""

import copy
from collections.abc import Iterator

import torch
from peft import get_peft_model

from ... import PASTAConfig, pasta
from .. import pid_baselines
from ..results import OURS
from .measurement import STOCK, Agreement, Measurement, close, difference, evaluating, run_of
from .models import Source, check_length
from .tokens import FIRST_ORDINARY_ID, random_sentences

FUSED = "ours, fused"


class PASTA:
    kinds = ("encoder",)
    trains = True
    sizes = {"batch": 32, "length": 128}
    quick = {"batch": 4, "length": 32}

    def __init__(self, source: Source, train: bool, largest: dict[str, int]):
        self.train, self.dtype = train, source.dtype
        stock = source.classifier()
        check_length(stock.base_model, largest["length"])
        # [CLS] and [SEP]: any two ids that no other token has
        self.special_ids = [i for i in range(FIRST_ORDINARY_ID) if i != stock.config.pad_token_id][:2]
        config = PASTAConfig(task_type="SEQ_CLS", num_special_tokens=2, special_token_ids=self.special_ids)
        # full fine-tuning needs its own weights
        base = copy.deepcopy(stock) if train else pid_baselines.twin(stock)
        ours, fused = (get_peft_model(pid_baselines.twin(base), config) for _ in range(2))
        vectors_of(fused).copy_(vectors_of(ours))
        self.models, self.missing = {STOCK: stock, OURS: ours}, {}
        try:
            pasta.fuse(fused)
            self.models[FUSED] = fused
        except ValueError as error:
            self.missing[FUSED] = str(error)
        self.candidates = {
            STOCK: "full fine-tuning: forward, backward and AdamW on all weights"
            if train
            else "the model without vectors",
            OURS: f"PASTAConfig and get_peft_model{': the same on vectors and head' if train else ''}",
            FUSED: "after pasta.fuse: add, norm and injection in one pass",
        }

    def cases(self, point: dict[str, int]) -> Iterator[Measurement]:
        inputs = random_sentences(self.models[STOCK], **point)
        inputs["input_ids"][:, 0], inputs["input_ids"][:, -1] = self.special_ids

        def check(outputs) -> Agreement:
            with evaluating(self.models.values()):
                return close(self.dtype, self.differences(inputs))

        candidates = {
            candidate: lambda model=model: run_of(model, inputs, self.train) for candidate, model in self.models.items()
        }
        yield Measurement(
            "training step" if self.train else "forward",
            point,
            point["batch"],
            "samples",
            candidates,
            check,
            self.missing,
        )

    def differences(self, inputs: dict) -> dict[str, float]:
        """Differences between our candidates, and from the stock model with vectors of zero."""
        stock, ours = (self.models[candidate](**inputs).logits for candidate in (STOCK, OURS))
        errors = {}
        if FUSED in self.models:
            errors["logits, fused and not"] = difference(self.models[FUSED](**inputs).logits, ours)
        vectors = vectors_of(self.models[OURS])
        before = vectors.clone()
        vectors.zero_()
        errors["logits with vectors of zero"] = difference(self.models[OURS](**inputs).logits, stock)
        vectors.copy_(before)
        return errors


def vectors_of(model) -> torch.Tensor:
    return model.base_model.model.pasta.pasta_vectors["default"].data  # [L, P, d]
