"""Prompt-in-Decoder: many prompts of every input, with the encoder's output repeated per prompt, and shared."""

from collections.abc import Iterator

import torch
import typer
from transformers.modeling_outputs import BaseModelOutput

from ... import pid
from ...pid.families import max_positions
from .. import methods
from ..workloads import Workload
from .case import OURS, STOCK, Agreement, Case, close, difference, evaluating, training_step
from .models import check_length
from .tokens import random_ids

PROMPT_TOKENS = 8


class PiD:
    kinds = ("encoder-decoder",)
    trains = True
    sizes = {"batch": 1, "streams": 30, "length": 512, "new_tokens": 10}
    quick = {"batch": 1, "streams": 4, "length": 64, "new_tokens": 4}

    def __init__(self, source, train: bool, largest: dict[str, int]):
        self.train, self.dtype = train, source.dtype
        self.model = source.language_model()
        self.enabled()  # says early what is not supported
        check_length(self.model, largest["length"])
        limit, needed = max_positions(self.model), 1 + PROMPT_TOKENS + largest["new_tokens"]
        if limit is not None and needed > limit:
            raise typer.BadParameter(
                f"the decoder has {limit} positions, got {needed} tokens, those of the prompt among them", param_hint="--new-tokens"
            )
        what = "forward, backward and AdamW on all weights" if train else "greedy generate"
        note = "; packed weights count as memory" if source.device == "cpu" and not train else ""
        if train and getattr(source.config, "attention_dropout", getattr(source.config, "dropout_rate", 0)):
            note = "; the model has attention dropout, which runs in stock attention on queries folded by input"
        self.ways = {
            STOCK: f"inputs encoded once, the encoder's output repeated per prompt of {PROMPT_TOKENS} tokens; stock {what}",
            OURS: f"pid.enable and pid.{'forward' if train else 'generate'}: keys and values of an input computed and kept once{note}",
        }

    def enabled(self):
        return pid.enable(methods.twin(self.model))

    def cases(self, point: dict[str, int]) -> Iterator[Case]:
        vocab_size = self.model.get_input_embeddings().num_embeddings
        pad = methods.pad_token(self.model)
        inputs = random_ids(point["batch"], point["length"], vocab_size=vocab_size, avoid=pad)
        prompts = random_ids(point["streams"], PROMPT_TOKENS, vocab_size=vocab_size, avoid=pad, seed=1)
        if self.train:
            yield self.training(point, inputs, prompts, random_ids(point["streams"], point["new_tokens"], vocab_size=vocab_size, avoid=pad, seed=2))
            return
        workload = Workload("", inputs.tolist(), prompts.tolist(), batch_size=point["batch"])
        yield self.generation("generate", point, workload, point["new_tokens"])
        yield self.generation("first token", {k: v for k, v in point.items() if k != "new_tokens"}, workload, 1)

    def generation(self, phase: str, shape: dict[str, int], workload: Workload, new_tokens: int) -> Case:
        def asking(method, model):
            return lambda: methods.ask(method, model, workload, new_tokens, full_length=True)

        def check(outputs) -> Agreement:
            wrong, streams = methods.differing(outputs[STOCK], outputs[OURS]), len(outputs[STOCK].tokens)
            return Agreement(not wrong, f"tokens: {wrong} of {streams} streams differ" if wrong else f"tokens: all {streams} streams identical")

        ways = {STOCK: lambda: asking(methods.repeated, self.model), OURS: lambda: asking(methods.shared, self.enabled())}
        return Case(phase, shape, shape["batch"] * shape["streams"] * new_tokens, "tokens", ways, check)

    def training(self, shape: dict[str, int], inputs: torch.Tensor, prompts: torch.Tensor, targets: torch.Tensor) -> Case:
        """The targets of an input's prompts are those of every input's."""
        device, (batch, streams) = self.model.device, (len(inputs), len(prompts))
        ids = inputs.to(device)
        starts = torch.full((streams, 1), methods.start_token(self.model))
        decoder_ids = torch.cat((starts, prompts, targets[:, :-1]), 1).repeat(batch, 1).to(device)  # [b*M, P + t]
        labels = torch.cat((torch.full_like(prompts, -100), targets), 1).repeat(batch, 1).to(device)

        def repeated(model):
            states = model.get_encoder()(input_ids=ids).last_hidden_state.repeat_interleave(streams, 0)
            return model(encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=decoder_ids, labels=labels).loss

        def shared(model):
            return pid.forward(model, ids, prompts.tolist(), [targets.tolist()] * batch).loss

        def check(outputs) -> Agreement:
            enabled = self.enabled()
            with evaluating((self.model, enabled)):
                return close(self.dtype, {"loss": difference(shared(enabled), repeated(self.model))})

        def step_of(model, loss):
            return training_step(model, lambda: loss(model))

        ways = {STOCK: lambda: step_of(self.model, repeated), OURS: lambda: step_of(self.enabled(), shared)}
        return Case("training step", shape, batch * streams, "streams", ways, check)
