"""Compilation and capture of the decoding step before traffic."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from .families import FAMILIES
from .prompts import _check_positions, _start_token
from .swap import _base, is_enabled

STEPS = 5  # CUDA graphs are captured in the second run of a compiled step


def warmup(
    model: nn.Module,
    *,
    inputs: tuple[int, int] | Tensor,
    new_tokens: int,
    prompts: int = 1,
    prompt_tokens: int = 0,
    **generate_kwargs: Any,
) -> None:
    """Compile the decoding step of ``generate(..., cache_implementation="static")`` and capture it as a CUDA graph.

    Generates a few tokens from inputs of the given sizes. Later calls replay the graph if their sizes round up to the
    same bucket: input tokens and the longest sequence of the decoder to multiples of 64, streams to multiples of 8, or
    of a quarter of the power of two below if that is more; the number of inputs has to be the same. On a CPU
    transformers compiles nothing.

    Args:
        model: a model that ``pid.enable`` has changed.
        inputs: (b, n), the number of inputs and their length; or a tensor of the encoder's inputs, such as the features
            of recordings.
        new_tokens: the ``max_new_tokens`` of later calls.
        prompts: number of prompts per input.
        prompt_tokens: the length of the longest prompt, without the start token.
        generate_kwargs: arguments of later calls that change their rows or their compilation: ``num_beams``,
            ``num_return_sequences``, ``do_sample``, ``compile_config``.

    Raises:
        ValueError: the model is not enabled, a size is too small, or the decoder has too few positions.
    """
    base = _base(model)
    if not is_enabled(model):
        raise ValueError("pid.warmup: the model is not enabled; call pid.enable(model) first")
    for name, size, least in (
        ("new_tokens", new_tokens, 1),
        ("prompts", prompts, 1),
        ("prompt_tokens", prompt_tokens, 0),
    ):
        if size < least:
            raise ValueError(f"pid.warmup: {name} must be at least {least}, got {size}")
    if not isinstance(inputs, Tensor) and len(inputs) != 2:
        raise ValueError(f"pid.warmup: inputs must be a shape (b, n) or a tensor, got {inputs!r}")
    x = inputs if isinstance(inputs, Tensor) else torch.zeros(inputs, dtype=torch.int64, device=base.device)
    arguments: dict[str, Any] = {base.main_input_name: x}
    if FAMILIES[base.config.model_type].takes_encoder_mask:
        _check_positions(base, 1 + prompt_tokens + new_tokens, prompt_tokens)
        start = _start_token(base, base.generation_config)
        ids = torch.full((x.shape[0] * prompts, 1 + prompt_tokens), start, device=base.device)
        arguments |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
        arguments |= {"attention_mask": torch.ones_like(x)}
    arguments |= {"max_new_tokens": new_tokens, "min_new_tokens": min(new_tokens, STEPS)}
    arguments |= {"cache_implementation": "static", "stopping_criteria": [_Steps()], **generate_kwargs}
    cast(Any, model).generate(**arguments)


class _Steps:
    """Stops generation after STEPS tokens."""

    tokens = 0

    def __call__(self, input_ids, scores, **kwargs) -> Tensor:
        self.tokens += 1
        return torch.full(input_ids.shape[:1], self.tokens >= STEPS, device=input_ids.device)
