"""Prompt-in-Decoder and its two baselines, and the models that they are compared on."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from .. import pid
from ..hf.names import cache_of
from ..pid.families import FAMILIES, family_of
from .workloads import VOCAB_SIZE, Workload


@dataclass
class Answers:
    """Generated ids (b*M, tokens), padded, in stream order; and the size of the cross-attention cache in bytes."""

    tokens: Tensor
    cross_bytes: int


Method = Callable[..., Answers]


def t5_base(dtype: torch.dtype = torch.float32, device: str = "cpu", **overrides) -> nn.Module:
    """T5-base's architecture with random weights from a fixed seed."""
    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12, "d_kv": 64}
    config = {"vocab_size": VOCAB_SIZE, **sizes, "decoder_start_token_id": 0, **overrides}
    torch.manual_seed(0)
    return sharpened(T5ForConditionalGeneration(T5Config(**config))).to(device, dtype).eval()


def sharpened(model: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
    """Rescale a random T5 so that its tokens depend on input, prompt and step, which makes comparing them meaningful.

    With the usual initialisation and tied embeddings it repeats its last token whatever it reads. This scales
    embeddings down and makes attention sharper.
    """
    with torch.no_grad():
        model.shared.weight.mul_(0.05)
        for block in model.decoder.block:
            own, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
            own.q.weight.mul_(8)
            own.o.weight.mul_(2)
            cross.q.weight.mul_(8)
    return model


def check_kind(name: str) -> None:
    """Check the kind of model from its configuration alone.

    Raises:
        OSError, ValueError: transformers cannot read a model of that name, or ``pid`` does not support it: it takes
            text encoder-decoder models.
    """
    config = AutoConfig.from_pretrained(name)
    kind = config.model_type
    if not config.is_encoder_decoder or kind not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"expected an encoder-decoder model of text, got {name}, which is {kind}")
    if kind not in FAMILIES:
        raise ValueError(f"{name} is {kind}, which pid does not support; supported are {', '.join(FAMILIES)}")


def load(name: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=dtype)
    family_of(model)  # fails early for an unsupported model
    return model.to(device).eval()


def twin(model: nn.Module) -> nn.Module:
    """A second model that shares the weights, so that one can be enabled while the other stays stock."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def prompt_in_encoder(model: nn.Module, inputs: Sequence[list[int]], prompts: Sequence[list[int]], **kwargs) -> Answers:
    """PiE: the encoder reads every input with every prompt appended; one ``generate`` over all rows."""
    ids, mask = padded([input + prompt for input in inputs for prompt in prompts], model)
    output = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **kwargs)
    return Answers(output.sequences[:, 1:], cross_bytes(output))


def repeated(model: nn.Module, inputs: Sequence[list[int]], prompts: Sequence[list[int]], **kwargs) -> Answers:
    """PiD without this package: encodes inputs once, repeats the encoder's output per prompt, calls stock ``generate``.

    Prompts of different lengths are padded on the left if the decoder's positions are relative. Other stock models are
    wrong with left padding, so prompts of each length get their own ``generate``.
    """
    ids, mask = padded(inputs, model)
    states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    start, pad = start_token(model), pad_token(model)
    lengths = sorted({len(prompt) for prompt in prompts})
    together = [lengths] if family_of(model).positions == "relative" else [[length] for length in lengths]
    tokens = torch.full((len(inputs), len(prompts), 0), pad, device=ids.device)
    most = 0
    for group in together:
        columns = [u for u, prompt in enumerate(prompts) if len(prompt) in group]
        decoder_ids, decoder_mask = padded([[start, *prompts[u]] for _ in inputs for u in columns], model, left=True)
        output = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states.repeat_interleave(len(columns), 0)),
            attention_mask=mask.repeat_interleave(len(columns), 0),
            decoder_input_ids=decoder_ids,
            decoder_attention_mask=decoder_mask,
            return_dict_in_generate=True,
            **kwargs,
        )
        tail = output.sequences[:, decoder_ids.shape[1] :].unflatten(0, (len(inputs), len(columns)))
        width = max(tail.shape[2], tokens.shape[2])
        tokens = _widened(tokens, width, pad)
        tokens[:, columns] = _widened(tail, width, pad)
        most = max(most, cross_bytes(output))
    return Answers(tokens.flatten(0, 1), most)


def shared(model: nn.Module, inputs: Sequence[list[int]], prompts: Sequence[list[int]], **kwargs) -> Answers:
    """PiD with this package; ``model`` is enabled."""
    ids, mask = padded(inputs, model)
    output = pid.generate(model, ids, prompts, attention_mask=mask, **kwargs).output
    return Answers(output.sequences[:, 1 + max(map(len, prompts)) :], cross_bytes(output))


def ask(method: Method, model: nn.Module, workload: Workload, new_tokens: int, *, full_length: bool) -> Answers:
    """Decode all batches of a workload greedily; ``full_length`` keeps models with random weights from ending early.

    ``cross_bytes`` is the size for the largest batch.
    """
    kwargs = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
    if full_length:
        kwargs["min_new_tokens"] = new_tokens
    with torch.inference_mode():
        answers = [method(model, batch, workload.prompts, **kwargs) for batch in workload.batches()]
    tokens = torch.cat([_widened(a.tokens, new_tokens, pad_token(model)) for a in answers])
    return Answers(tokens.cpu(), max(a.cross_bytes for a in answers))


def cross_bytes(output) -> int:
    """Bytes of the keys and values that cross-attention held."""
    return sum(x.nbytes for layer in cache_of(output).cross_attention_cache.layers for x in (layer.keys, layer.values))


def differing(a: Answers, b: Answers) -> int:
    """Number of streams whose tokens differ."""
    return int((a.tokens != b.tokens).any(1).sum())


def padded(rows: Sequence[list[int]], model: nn.Module, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows of different lengths."""
    width, pad = max(map(len, rows)), pad_token(model)
    fill = [[pad] * (width - len(row)) for row in rows]
    ids = torch.tensor([f + row if left else row + f for row, f in zip(rows, fill)], device=model.device)
    used = torch.tensor([len(row) for row in rows], device=model.device)[:, None]
    positions = torch.arange(width, device=model.device)
    return ids, (positions >= width - used if left else positions < used).long()


def pad_token(model: nn.Module) -> int:
    config = model.generation_config
    return next(
        (x for x in (config.pad_token_id, model.config.get_text_config(decoder=True).pad_token_id) if x is not None), 0
    )


def start_token(model: nn.Module) -> int:
    config = model.generation_config
    return config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id


def _widened(tokens: Tensor, width: int, pad: int) -> Tensor:
    return nn.functional.pad(tokens, (0, width - tokens.shape[-1]), value=pad)
