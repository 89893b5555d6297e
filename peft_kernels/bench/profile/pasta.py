"""Special token adaptation: the stock model against one with vectors, and with the norms fused too."""

import copy
from collections.abc import Iterator

import torch
from peft import get_peft_model

from ... import PASTAConfig, pasta
from .. import methods
from .case import OURS, STOCK, Agreement, Case, close, difference, evaluating, training_step, without_gradient
from .models import check_length
from .tokens import FIRST_ORDINARY_ID, random_ids

FUSED = "ours, fused"


class PASTA:
    kinds = ("encoder",)
    trains = True
    sizes = {"batch": 32, "length": 128}
    quick = {"batch": 4, "length": 32}

    def __init__(self, source, train: bool, largest: dict[str, int]):
        self.train, self.dtype = train, source.dtype
        stock = source.classifier()
        self.pad = stock.config.pad_token_id
        self.special_ids = [i for i in range(FIRST_ORDINARY_ID) if i != self.pad][:2]  # [CLS] and [SEP]: any ids that no other token has
        check_length(stock.base_model, largest["length"])
        # what is tuned in full needs weights of its own
        base = copy.deepcopy(stock) if train else methods.twin(stock)
        config = PASTAConfig(task_type="SEQ_CLS", num_special_tokens=2, special_token_ids=self.special_ids)
        self.models = {STOCK: stock, OURS: get_peft_model(methods.twin(base), config)}
        self.missing = {}
        fused = get_peft_model(methods.twin(base), config)
        vectors_of(fused).copy_(vectors_of(self.models[OURS]))
        try:
            pasta.fuse(fused)
            self.models[FUSED] = fused
        except ValueError as error:
            self.missing[FUSED] = str(error)
        trained = "forward, backward and AdamW on "
        self.ways = {
            STOCK: f"full fine-tuning: {trained}all weights" if train else "the model without vectors",
            OURS: f"PASTAConfig and get_peft_model{f': {trained}vectors and head' if train else ''}",
            FUSED: "the same after pasta.fuse: add, norm and injection in one pass",
        }

    def cases(self, point: dict[str, int]) -> Iterator[Case]:
        batch, length = point["batch"], point["length"]
        model = self.models[STOCK]
        ids = random_ids(batch, length, vocab_size=model.get_input_embeddings().num_embeddings, avoid=self.pad)
        ids[:, 0], ids[:, -1] = self.special_ids
        ids = ids.to(model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch, device=model.device) % 2}

        def run_of(model):
            if self.train:
                return training_step(model, lambda: model(**inputs).loss)
            return without_gradient(lambda: model(**inputs).logits)

        def check(outputs) -> Agreement:
            """With vectors of zero all ways are the stock model; with others those of ours agree."""
            with evaluating(self.models.values()):
                return close(self.dtype, self.differences(inputs))

        ways = {way: lambda model=model: run_of(model) for way, model in self.models.items()}
        yield Case("training step" if self.train else "forward", point, batch, "samples", ways, check, self.missing)

    def differences(self, inputs: dict) -> dict[str, float]:
        stock, ours = (self.models[way](**inputs).logits for way in (STOCK, OURS))
        found = {}
        if FUSED in self.models:
            found["logits, fused"] = difference(self.models[FUSED](**inputs).logits, ours)
        vectors = vectors_of(self.models[OURS])
        before = vectors.clone()
        vectors.zero_()
        found["logits with vectors of zero"] = difference(self.models[OURS](**inputs).logits, stock)
        vectors.copy_(before)
        return found


def vectors_of(model) -> torch.Tensor:
    return model.base_model.model.pasta.pasta_vectors["default"].data  # [L, P, d]
