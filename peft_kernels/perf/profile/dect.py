"""Decoder tuning's extraction: logits of every position against logits of the label words at the mask."""

from collections.abc import Iterator
from functools import cached_property
from itertools import cycle, islice

import torch
import typer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from ... import dect
from ..results import OURS
from ..workloads import built_in_text
from .measurement import STOCK, Agreement, Measurement, close, difference
from .models import Source, check_length
from .tokens import T5_MASK, word_tokenizer

LABEL_WORDS = ["terrible", "great"]


class DecT:
    kinds = ("encoder", "causal", "encoder-decoder")
    trains = False
    sizes = {"batch": 32, "length": 128}
    quick = {"batch": 4, "length": 32}

    def __init__(self, source: Source, train: bool, largest: dict[str, int]):
        self.dtype = source.dtype
        self.model = source.language_model()
        self.template = "{text} It was {mask}" if source.kind == "causal" else "{text} It was {mask}."
        self.seq2seq, self.causal = source.kind == "encoder-decoder", source.kind == "causal"
        words = [*self.template.replace(".", " .").split(), *LABEL_WORDS, *built_in_text().split()]
        self.tokenizer = (
            word_tokenizer(source.config, source.kind, words)
            if source.random
            else AutoTokenizer.from_pretrained(source.name)
        )
        check_length(self.model.base_model, largest["length"])
        self.extract([""], 1)  # fails early for an unsupported model
        self.candidates = {
            STOCK: "texts tokenized, logits of the whole vocabulary at every position, then those of two label words"
            " at the mask",
            OURS: "dect.extract: the head computes two label words at the mask alone",
        }

    def extract(self, texts: list[str], batch_size: int) -> dect.Extraction:
        return dect.extract(self.model, self.tokenizer, texts, self.template, LABEL_WORDS, batch_size=batch_size)

    def cases(self, point: dict[str, int]) -> Iterator[Measurement]:
        texts = [self.text(point["length"], start) for start in range(point["batch"])]

        def check(outputs) -> Agreement:
            ours, stock = vars(outputs[OURS]), vars(outputs[STOCK])
            return close(self.dtype, {name: difference(ours[name], stock[name]) for name in ours})

        candidates = {STOCK: lambda: lambda: self.by_hand(texts), OURS: lambda: lambda: self.extract(texts, len(texts))}
        yield Measurement("forward", point, len(texts), "samples", candidates, check)

    def text(self, length: int, start: int) -> str:
        """As many words as fit into ``length`` tokens together with the template."""
        words = list(islice(cycle(built_in_text().split()), start, start + length))
        while words and len(self.ids([" ".join(words)])[0]) > length:
            words.pop()
        if not words:
            raise typer.BadParameter(
                f"the template and its mask leave no room for a text in {length} tokens", param_hint="--length"
            )
        return " ".join(words)

    def ids(self, texts: list[str]) -> list[list[int]]:
        mask = "" if self.causal else T5_MASK if self.seq2seq else self.tokenizer.mask_token
        rows = self.tokenizer(
            [self.template.replace("{mask}", mask).replace("{text}", text).rstrip() for text in texts]
        )["input_ids"]
        return [ids[:-1] if self.causal and ids[-1] == self.tokenizer.eos_token_id else ids for ids in rows]

    @torch.no_grad()
    def by_hand(self, texts: list[str]) -> dect.Extraction:
        """Process the texts in one batch, then the empty text, as ``dect.extract`` does."""
        (features, scores), (_, empty) = self.batch_by_hand(texts), self.batch_by_hand([""])
        return dect.Extraction(features, scores, empty[0])

    def batch_by_hand(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [torch.tensor(row) for row in self.ids(texts)]
        pad = 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ids = pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.seq2seq:
            prefix = [self.model.config.decoder_start_token_id, self.tokenizer.convert_tokens_to_ids(T5_MASK)]
            inputs["decoder_input_ids"] = torch.tensor([prefix] * len(texts))
            positions = torch.ones(len(texts), dtype=torch.long)
        elif self.causal:
            positions = mask.sum(1) - 1
        else:
            positions = (ids == self.tokenizer.mask_token_id).int().argmax(1)
        output = self.model(**{name: x.to(self.model.device) for name, x in inputs.items()}, output_hidden_states=True)
        hidden = (output.decoder_hidden_states if self.seq2seq else output.hidden_states)[-1]
        at = torch.arange(len(texts)), positions
        return hidden[at].float().cpu(), output.logits[at][:, self.label_ids].float().cpu()

    @cached_property
    def label_ids(self) -> list[int]:
        """The id of each word's first piece after a space."""
        before = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return [self.tokenizer(f"a {word}", add_special_tokens=False)["input_ids"][len(before)] for word in LABEL_WORDS]
