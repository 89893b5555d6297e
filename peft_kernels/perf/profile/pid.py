"""Prompt-in-Decoder: many prompts of every input, with the encoder's output repeated per prompt, and shared."""

from collections.abc import Iterator

import torch
import typer
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from ... import pid
from ...pid.families import max_positions
from .. import pid_baselines
from ..results import OURS
from ..workloads import Workload
from .measurement import STOCK, Agreement, Measurement, close, difference, evaluating, training_step
from .models import Source, check_length
from .tokens import random_ids

PROMPT_TOKENS = 8
UNPACKED = "ours, not packed"


class PiD:
    kinds = ("encoder-decoder",)
    trains = True
    sizes = {"batch": 1, "streams": 30, "length": 512, "new_tokens": 10}
    quick = {"batch": 1, "streams": 4, "length": 64, "new_tokens": 4}

    def __init__(self, source: Source, train: bool, largest: dict[str, int]):
        self.train, self.dtype = train, source.dtype
        self.model = source.language_model()
        self.enabled()  # fails early for an unsupported model
        check_length(self.model, largest["length"])
        limit, needed = max_positions(self.model), 1 + PROMPT_TOKENS + largest["new_tokens"]
        if limit is not None and needed > limit:
            raise typer.BadParameter(
                f"the decoder has {limit} positions, got {needed} tokens, those of the prompt among them",
                param_hint="--new-tokens",
            )
        encoded_once = f"inputs encoded once, the encoder's output repeated per prompt of {PROMPT_TOKENS} tokens"
        self.candidates = {
            STOCK: f"{encoded_once}; {'forward, backward and AdamW on all weights' if train else 'greedy generate'}",
            OURS: f"pid.enable and pid.{'forward' if train else 'generate'}: keys and values of an input computed and"
            " kept once",
        }
        if not train and source.device == "cpu":  # weights are packed on CPUs only
            self.candidates[UNPACKED] = "without the second copy of linear weights, packed for few rows"
        if train and getattr(source.config, "attention_dropout", getattr(source.config, "dropout_rate", 0)):
            self.candidates[OURS] += (
                "; the model has attention dropout, which runs in stock attention on queries folded by input"
            )

    def enabled(self, **options):
        return pid.enable(pid_baselines.twin(self.model), **options)

    def cases(self, point: dict[str, int]) -> Iterator[Measurement]:
        inputs = random_ids(self.model, point["batch"], point["length"])
        prompts = random_ids(self.model, point["streams"], PROMPT_TOKENS, seed=1)
        if self.train:
            yield self.training(
                point, inputs, prompts, random_ids(self.model, point["streams"], point["new_tokens"], seed=2)
            )
            return
        workload = Workload("", inputs.tolist(), prompts.tolist(), batch_size=point["batch"])
        yield self.generation("generate", point, workload, point["new_tokens"])
        yield self.generation("first token", {k: v for k, v in point.items() if k != "new_tokens"}, workload, 1)

    def generation(self, phase: str, shape: dict[str, int], workload: Workload, new_tokens: int) -> Measurement:
        def asking(method, model):
            return lambda: pid_baselines.ask(method, model, workload, new_tokens, full_length=True)

        def check(outputs) -> Agreement:
            wrong = max(pid_baselines.differing(outputs[STOCK], other) for other in outputs.values())
            streams = len(outputs[STOCK].tokens)
            return Agreement(
                not wrong,
                f"tokens: {wrong} of {streams} streams differ" if wrong else f"tokens: all {streams} streams identical",
            )

        candidates = {
            STOCK: lambda: asking(pid_baselines.repeated, self.model),
            OURS: lambda: asking(pid_baselines.shared, self.enabled()),
            UNPACKED: lambda: asking(pid_baselines.shared, self.enabled(pack_weights=False)),
        }
        candidates = {candidate: make for candidate, make in candidates.items() if candidate in self.candidates}
        return Measurement(phase, shape, shape["batch"] * shape["streams"] * new_tokens, "tokens", candidates, check)

    def training(self, shape: dict[str, int], ids: Tensor, prompts: Tensor, targets: Tensor) -> Measurement:
        """A training step; the targets of the prompts are the same for every input."""
        batch, streams = len(ids), len(prompts)
        starts = prompts.new_full((streams, 1), pid_baselines.start_token(self.model))
        decoder_ids = torch.cat((starts, prompts, targets[:, :-1]), 1).repeat(batch, 1)  # [b*M, P + t]
        labels = torch.cat((torch.full_like(prompts, -100), targets), 1).repeat(batch, 1)

        def repeated(model):
            states = model.get_encoder()(input_ids=ids).last_hidden_state.repeat_interleave(streams, 0)
            return model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=decoder_ids, labels=labels
            ).loss

        def shared(model):
            return pid.forward(model, ids, prompts.tolist(), [targets.tolist()] * batch).loss

        def check(outputs) -> Agreement:
            enabled = self.enabled()
            with evaluating((self.model, enabled)):
                return close(self.dtype, {"loss": difference(shared(enabled), repeated(self.model))})

        def step_of(model, loss):
            return training_step(model, lambda: loss(model))

        candidates = {STOCK: lambda: step_of(self.model, repeated), OURS: lambda: step_of(self.enabled(), shared)}
        return Measurement("training step", shape, batch * streams, "streams", candidates, check)
