"""Generation and training with many prompts per input: the decoder prefixes of Prompt-in-Decoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..hf.names import BUILDS_MASKS_IN_STEPS, CACHE, cache_of
from .families import FAMILIES, max_positions
from .static import FixedCache
from .swap import _base, is_enabled

Prompts = Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]]


@dataclass
class PiDOutput:
    """The result of ``pid.generate``.

    Attributes:
        sequences: ``sequences[i][u]`` is the list of generated token ids for input i and prompt u, without the prompt
            and padding, with the end token; with ``num_return_sequences`` > 1, a list of such lists.
        scores: with ``output_scores=True``, the log-probabilities of these tokens in the same nesting, as 1-d float32
            tensors on the CPU; otherwise None.
        output: the return value of transformers' ``generate``, with the rows of all streams in order. After a compiled
            generation with a static cache it has no cache.
    """

    sequences: list[list]
    scores: list[list] | None
    output: Any


def generate(
    model: nn.Module,
    input_ids: Tensor,
    prompts: Prompts,
    *,
    attention_mask: Tensor | None = None,
    **generate_kwargs: Any,
) -> PiDOutput:
    """Encode every input once and continue each of its prompts. Prompt-in-Decoder, arXiv 2403.13112, section 3.

    A prompt is a forced prefix of the decoder, after the decoder's start token. Prompts of different length are padded
    on the left, which is exact: padding is masked, and positions do not count it. Attention masks of the inputs may be
    padded on either side or have holes; this is exact too.

    Args:
        model: a model that ``pid.enable`` has changed.
        input_ids: (b, n), the encoder's inputs.
        prompts: a list of prompts, each a list of token ids, for every input; or a list of such lists, one per input,
            where ``prompts[i][u]`` is prompt u of input i. The nesting depth tells the two apart. An empty prompt is
            the start token alone.
        attention_mask: (b, n), nonzero where ``input_ids`` are not padding; None: no padding.
        generate_kwargs: any argument of ``model.generate``: ``max_new_tokens``, ``num_beams``, ``do_sample``,
            ``cache_implementation``... ``max_length`` includes the longest prompt.

    Raises:
        ValueError: the model is not enabled; there are no inputs or no prompts; the number of prompt lists differs from
            the number of inputs; or a prompt is longer than the decoder has positions for.
        TypeError: a token id is not an integer.
    """
    base = _checked(model, "generate")
    if input_ids.ndim != 2 or input_ids.shape[0] == 0:
        raise ValueError(f"pid.generate: input_ids must be (b, n) with b > 0, got {tuple(input_ids.shape)}")
    per_input = _per_input(prompts, input_ids.shape[0], "prompts")
    flat = [prompt for own_prompts in per_input for prompt in own_prompts]
    config, _ = base._prepare_generation_config(
        generate_kwargs.get("generation_config"),
        **{k: v for k, v in generate_kwargs.items() if k != "generation_config"},
    )
    longest = max(map(len, flat)) + 1
    _check_positions(base, longest + (config.max_new_tokens or 1), longest - 1)

    start = _start_token(base, config)
    device = input_ids.device
    pad = start if config.pad_token_id is None else config.pad_token_id
    padding = [longest - 1 - len(prompt) for prompt in flat]
    rows = [[pad] * columns + [start, *prompt] for columns, prompt in zip(padding, flat)]
    streams = {"decoder_input_ids": torch.tensor(rows).to(device), "left_padded_prompts": any(padding)}
    # without a mask, no step has to read one
    if any(padding) or (config.cache_implementation and BUILDS_MASKS_IN_STEPS):
        mask = [[0] * columns + [1] * (longest - columns) for columns in padding]
        streams["decoder_attention_mask"] = torch.tensor(mask).to(device)
    counts = list(map(len, per_input))
    if len(set(counts)) > 1:
        streams["encoder_index"] = _index(counts, device)

    arguments = {**generate_kwargs, "return_dict_in_generate": True}
    output = cast(Any, model).generate(input_ids=input_ids, attention_mask=attention_mask, **streams, **arguments)
    if isinstance(cache := cache_of(output), FixedCache):  # the next call has its buffers
        output[CACHE] = None
        cache.release()
    repeats = config.num_return_sequences or 1
    sequences = _cut(output.sequences[:, longest:], config.eos_token_id, config.pad_token_id)
    scores = None
    if config.output_scores:
        steps = base.compute_transition_scores(
            output.sequences, output.scores, getattr(output, "beam_indices", None), normalize_logits=True
        ).cpu()
        scores = _nested([row[: len(sequence)] for row, sequence in zip(steps, sequences)], counts, repeats)
    return PiDOutput(_nested(sequences, counts, repeats), scores, output)


def forward(
    model: nn.Module,
    input_ids: Tensor,
    prompts: Prompts,
    targets: Sequence[Sequence[Sequence[int]]],
    *,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Compute the loss of the target tokens of every stream, conditioned on its input, prompt and preceding tokens.

    The loss is ``-sum log p(y_t | E, prompt, y_<t)`` over all streams, divided by the number of target tokens as in
    transformers. Prompt-in-Decoder, arXiv 2403.13112, equation 4; prompt positions have the label -100.

    Args:
        model: a model that ``pid.enable`` has changed.
        input_ids: (b, n).
        prompts: as in ``generate``.
        targets: ``targets[i][u]`` is the list of token ids to learn for input i and prompt u, with the end token.
        attention_mask: (b, n) or None.
        kwargs: any other argument of the model's forward.

    Returns:
        The model's output; ``loss`` is a scalar, ``logits`` are (N, T, V) for the streams in order, padded on the
        right.

    Raises:
        ValueError, TypeError: as in ``generate``; also if the number of targets differs from the number of prompts, or
            if no target has a token.
    """
    base = _checked(model, "forward")
    per_input = _per_input(prompts, input_ids.shape[0], "prompts")
    targets_per_input = _per_input(targets, input_ids.shape[0], "targets", shared=False)
    counts = list(map(len, per_input))
    if counts != list(map(len, targets_per_input)):
        raise ValueError(
            f"pid.forward: every prompt needs a target, got {counts} prompts and"
            f" {list(map(len, targets_per_input))} targets per input"
        )
    pairs = [(list(p), list(y)) for ps, ys in zip(per_input, targets_per_input) for p, y in zip(ps, ys)]
    if not any(y for _, y in pairs):
        raise ValueError("pid.forward: targets must have at least one token, got none")
    length = max(len(p) + len(y) for p, y in pairs)
    _check_positions(base, length, max(len(p) for p, _ in pairs))
    start, device = _start_token(base, base.generation_config), input_ids.device
    pad = base.config.get_text_config(decoder=True).pad_token_id
    ids = torch.full((len(pairs), length), start if pad is None else pad, device=device)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, target) in enumerate(pairs):
        tokens = [start, *prompt, *target[:-1]] if target else [start, *prompt][: max(len(prompt), 1)]
        ids[row, : len(tokens)] = torch.tensor(tokens, device=device)
        mask[row, : len(tokens)] = 1
        labels[row, len(prompt) : len(prompt) + len(target)] = torch.tensor(target, dtype=ids.dtype, device=device)
    name = "decoder_encoder_index" if base.config.model_type == "encoder-decoder" else "encoder_index"
    index = {name: _index(counts, device)} if len(set(counts)) > 1 else {}
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        decoder_input_ids=ids,
        decoder_attention_mask=mask,
        labels=labels,
        **index,
        **kwargs,
    )


def _checked(model, function):
    """The transformers model of an enabled ``model`` whose decoder takes prompts."""
    if not is_enabled(model):
        raise ValueError(f"pid.{function}: the model is not enabled; call pid.enable(model) first")
    base = _base(model)
    if not FAMILIES[base.config.model_type].takes_encoder_mask:
        raise ValueError(
            f"pid.{function}: model_type {base.config.model_type!r} takes no text prompts; use model.generate"
        )
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(
            f"pid.{function}: {adapter.peft_type.value} puts keys of its own in front of the decoder's, where the masks"
            " of prompts do not count them; use model.generate with decoder_input_ids"
        )
    return base


def _per_input(prompts, inputs: int, argument: str, shared: bool = True) -> list[list]:
    """One list of token-id lists per input; ``shared``: a flat list is that of every input."""
    if not _is_list(prompts) or len(prompts) == 0:
        raise ValueError(f"pid: {argument} must be a list that is not empty, got {prompts!r}")
    nested = any(isinstance(prompt, Sequence) and any(map(_is_list, prompt)) for prompt in prompts)
    if not nested and not shared:
        raise ValueError(f"pid: {argument} must be nested: {argument}[i][u] is the token-id list of input i, prompt u")
    per_input = list(map(list, prompts)) if nested else [list(prompts)] * inputs
    if len(per_input) != inputs:
        raise ValueError(
            f"pid: {argument} must have one list per input, got {len(per_input)} lists for {inputs} inputs"
        )
    if not any(per_input):
        raise ValueError(f"pid: {argument} must not be empty for every input, got {prompts!r}")
    for own_prompts in per_input:
        for prompt in own_prompts:
            if not _is_list(prompt) or any(isinstance(t, bool) or not isinstance(t, int) for t in prompt):
                raise TypeError(f"pid: {argument} must hold lists of int token ids, got {prompt!r}")
    return per_input


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _index(counts: list[int], device) -> Tensor:
    """The input of every stream, (N,), where input i has ``counts[i]`` streams."""
    return torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))


def _start_token(base, config) -> int:
    start = config.decoder_start_token_id
    if start is None:
        start = getattr(base.config, "decoder_start_token_id", None)
    if start is None:
        start = config.bos_token_id
    if start is None:
        raise ValueError(
            "pid: the model has no decoder_start_token_id; set model.generation_config.decoder_start_token_id"
        )
    return start if isinstance(start, int) else start[0]


def _check_positions(base, length: int, prompt: int):
    limit = max_positions(base)
    if limit is not None and length > limit:
        raise ValueError(
            f"pid: the decoder has {limit} positions, but a prompt of {prompt} tokens with its start token and the"
            f" tokens after it needs {length}"
        )


def _cut(sequences: Tensor, eos, pad) -> list[list[int]]:
    """The rows, each cut after its first end token; a row without an end token loses its trailing padding."""
    ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    result = []
    for row in sequences.tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        if end is not None:
            row = row[: end + 1]
        else:
            while row and row[-1] == pad:
                row.pop()
        result.append(row)
    return result


def _nested(rows: list, counts: list[int], repeats: int) -> list[list]:
    streams = iter(rows if repeats == 1 else [rows[i : i + repeats] for i in range(0, len(rows), repeats)])
    return [[next(streams) for _ in range(count)] for count in counts]
