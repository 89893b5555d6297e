"""Decomposed prompt tuning: our embedding against the authors' order of operations, and against PEFT's prompt
tuning.
"""

import copy
from collections.abc import Iterator

import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from ... import DePTConfig
from ...dept.family import inserts_after_first
from .. import pid_baselines
from ..results import OURS
from .measurement import STOCK, Agreement, Measurement, close, difference, evaluating, run_of
from .models import Source, check_length
from .tokens import random_sentences

PROMPT_TUNING = "prompt tuning"
VIRTUAL_TOKENS, RANK = 60, 30  # the paper's setting at T5-base (table 1): as many trained parameters as 100 prompt rows
LABEL_TOKENS = 4
TASKS = {"encoder-decoder": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "encoder": "SEQ_CLS"}


class DePT:
    kinds = tuple(TASKS)
    trains = True
    sizes = {"batch": 8, "length": 256}
    quick = {"batch": 2, "length": 64}

    def __init__(self, source: Source, train: bool, largest: dict[str, int]):
        self.train, self.dtype, self.kind = train, source.dtype, source.kind
        self.base = source.classifier() if source.kind == "encoder" else source.language_model()
        table, longest = self.base.get_input_embeddings(), largest["length"]
        rows = VIRTUAL_TOKENS + round(RANK * (longest + table.embedding_dim) / table.embedding_dim)
        check_length(self.base if self.base.can_generate() else self.base.base_model, longest, rows)
        task = TASKS[source.kind]
        config = DePTConfig(task_type=task, num_virtual_tokens=VIRTUAL_TOKENS, r=RANK, max_length=longest)
        ours = get_peft_model(pid_baselines.twin(self.base), config)
        layer = ours.base_model.model.dept
        prompt, a, b = (parameters["default"] for parameters in (layer.dept_prompt, layer.dept_a, layer.dept_b))
        # as large as embeddings: with the zero update that training starts from, the comparison would be empty
        for parameter in (
            prompt,
            b,
        ):
            parameter.data.normal_(std=float(table.weight.float().std()))
        tuning = PromptTuningConfig(task_type=task, num_virtual_tokens=rows, num_transformer_submodules=1)
        self.models = {
            STOCK: Official(pid_baselines.twin(self.base), prompt, a, b, config.scale),
            PROMPT_TUNING: get_peft_model(pid_baselines.twin(self.base), tuning),
            OURS: ours,
        }
        self.candidates = {
            STOCK: f"DePT, {VIRTUAL_TOKENS} prompt rows and rank {RANK}, in the authors' order of work: repeat,"
            " multiply, add, concatenate",
            PROMPT_TUNING: f"PEFT's, {rows} rows, as many trained numbers",
            OURS: "DePTConfig and get_peft_model: prompt, embedding and update in one pass",
        }

    def cases(self, point: dict[str, int]) -> Iterator[Measurement]:
        inputs = random_sentences(self.base, **point)
        if self.kind != "encoder":
            inputs["labels"] = (
                inputs["input_ids"] if self.kind == "causal" else inputs["input_ids"][:, :LABEL_TOKENS].contiguous()
            )

        def check(outputs) -> Agreement:
            with evaluating(self.models.values()):
                ours, stock = (self.models[candidate](**inputs) for candidate in (OURS, STOCK))
            logits = stock.logits[:, -point["length"] :] if self.kind == "causal" else stock.logits
            return close(
                self.dtype, {"logits": difference(ours.logits, logits), "loss": difference(ours.loss, stock.loss)}
            )

        candidates = {
            candidate: lambda model=model: run_of(model, inputs, self.train) for candidate, model in self.models.items()
        }
        yield Measurement(
            "training step" if self.train else "forward", point, point["batch"], "samples", candidates, check
        )


class Official(nn.Module):
    """DePT as its authors write it, around a stock model that is frozen except for its head."""

    def __init__(self, model: nn.Module, prompt: Tensor, a: Tensor, b: Tensor, scale: float):
        super().__init__()
        self.model, self.scale = model.requires_grad_(False), scale
        self.prompt, self.a, self.b = (nn.Parameter(x.detach().clone()) for x in (prompt, a, b))
        self.after_first = int(not model.can_generate() and inserts_after_first(model.base_model))
        self.widens_labels = model.can_generate() and not model.config.is_encoder_decoder
        if not model.can_generate():
            for name, head in [
                (name, child) for name, child in model.named_children() if name != model.base_model_prefix
            ]:
                setattr(model, name, copy.deepcopy(head).requires_grad_())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor):
        batch, length = input_ids.shape
        embedded = self.model.get_input_embeddings()(input_ids)
        prompts = self.prompt.repeat(batch, 1, 1).to(embedded.dtype)
        update = (self.a @ self.b).repeat(batch, 1, 1)[:, :length] * self.scale
        tokens = embedded + update.to(embedded.dtype)
        embedded = torch.cat((tokens[:, : self.after_first], prompts, tokens[:, self.after_first :]), 1)
        mask = torch.cat((attention_mask.new_ones(batch, prompts.shape[1]), attention_mask), 1)
        if self.widens_labels:
            labels = torch.cat((labels.new_full((batch, prompts.shape[1]), -100), labels), 1)
        return self.model(inputs_embeds=embedded, attention_mask=mask, labels=labels)
