"""Probes how a model reads its tokens, by calling it.

No configuration says whether a forward uses ``input_ids`` for more than their embeddings, or whether it scales its
embeddings, and lists of names go stale. So ``get_peft_model`` calls the model with a handful of tokens: twice in full,
once with ``input_ids`` and once with their embeddings, and twice up to the first layer. The model is not changed:
training modes and the random state are restored. A model on the meta device is probed at the first forward after its
weights are loaded.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hf.call_state import CallState
from ..hf.peft_method import is_causal, is_encoder_decoder
from .family import keeps_rope_deltas

_ORDINARY = 4  # tokens of a probe without a special role

probing = CallState()  # True while a model is probed: hooks skip such calls


@dataclass
class Reading:
    """The scales of the first layer's input relative to the embedding module's output and to ``inputs_embeds``."""

    table: nn.Embedding  # the module that looks input_ids up
    token_scale: float = 1.0  # the first layer's input over the embedding module's output
    input_scale: float = 1.0  # the first layer's input over inputs_embeds
    by_ids: bool = False  # whether input_ids are read for more than their embeddings and must be passed
    filler: int = 0  # a token without a special role, for the prompt's columns


class _Reached(Exception):
    """Raised to stop the forward once the first layer is reached."""


def read(module: nn.Module, table: nn.Embedding) -> Reading:
    """Probe ``module``, which gets the prompt, with its input embedding ``table``.

    Raises:
        ValueError: the module cannot be called with tokens alone, does not use ``table``, or is a decoder or an
            encoder-decoder that uses ``input_ids`` for more than their embeddings.
    """
    name = type(module).__name__
    with _undisturbed(module, table):
        ids, filler = _tokens(module, table)
        try:
            expected, calls, embedding = _call(module, table, input_ids=ids)
        except Exception as error:
            raise ValueError(f"DePT: {name} must take input_ids alone, but raises {_described(error)}") from error
        if embedding is None:
            raise ValueError(f"DePT: {name} must look its tokens up in its input embedding, but does not call it")
        embeddings = embedding(ids)
        step = 2.0 ** embeddings.abs().max().float().clamp_min(1e-3).log2().round().item()
        token_scale = _scale(module, table, calls, step, input_ids=ids)
        try:
            outputs, calls, _ = _call(module, table, inputs_embeds=embeddings)
            input_scale = _scale(module, table, calls, step, inputs_embeds=embeddings)
            if token_scale != input_scale:
                outputs, *_ = _call(module, table, inputs_embeds=embeddings * (token_scale / input_scale))
            difference = _difference(outputs, expected)
        except Exception as error:
            difference, input_scale = f"raises {_described(error)} without them", 1.0
    if difference and (is_causal(module) or is_encoder_decoder(module)):
        raise ValueError(
            f"DePT: {name} reads input_ids for more than their embeddings, and a prompt has no ids: it {difference}"
        )
    return Reading(embedding, token_scale, input_scale, bool(difference), filler)


@contextmanager
def _undisturbed(module, table):
    modes = {m: m.training for m in module.modules()}
    device = table.weight.device
    probing.set(True)
    try:
        module.eval()
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        probing.set(None)
        for m, mode in modes.items():
            m.training = mode


def _tokens(module, table):
    """Ids (1, n), with the special ones that an encoder's forward may look for, and one id without a special role."""
    config = module.config
    roles = _roles(config.to_dict())
    ordinary = [i for i in range(table.num_embeddings) if i not in roles.values()][:_ORDINARY] or [0]
    special = [getattr(config, "mask_token_id", None)]
    if not is_causal(module) and not is_encoder_decoder(module):
        special += [getattr(config, "pad_token_id", None), *(getattr(m, "padding_idx", None) for m in module.modules())]
    special = [i for i in dict.fromkeys(special) if isinstance(i, int) and 0 <= i < table.num_embeddings]
    device = table.weight.device if table.weight.device.type != "meta" else None
    return torch.tensor([ordinary + special], device=device), ordinary[-1]


def _roles(settings: dict) -> dict[str, int]:
    """The token ids that a configuration names, by the names of their settings."""
    roles = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            roles |= {f"{name}.{k}": v for k, v in _roles(value).items()}
        elif isinstance(value, int) and str(name).endswith(("token_id", "token_index", "_idx")):
            roles[str(name)] = value
    return roles


def _call(module, table, *, observe=None, add=0.0, **inputs):
    """The outputs of a forward, the input and output of every leaf module, and the module that looked up the ids.

    ``add`` is added to the embeddings. ``observe(i, input, output)`` is called after leaf module i of the forward.
    """
    calls, embeddings = [], []

    def after_embedding(m, args, output):
        embeddings.append(m)
        return output + add if add else None

    def after_leaf(m, args, kwargs, output):
        call = _tensor(args if args else tuple(kwargs.values())), _tensor(output)
        if observe is not None:
            observe(len(calls), *call)
        calls.append(call)

    handles = []
    for m in module.modules():
        if isinstance(m, nn.Embedding) and m.weight is table.weight:
            if "input_ids" in inputs:
                handles.append(m.register_forward_hook(after_embedding))
        elif not any(True for _ in m.children()):
            handles.append(m.register_forward_hook(after_leaf, with_kwargs=True))
    try:
        torch.manual_seed(0)
        output = module(**_arguments(module, **inputs))
    finally:
        for handle in handles:
            handle.remove()
    values = output.values() if hasattr(output, "values") else output
    outputs = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return outputs, calls, embeddings[0] if embeddings else None


def _arguments(module, input_ids=None, inputs_embeds=None):
    x = inputs_embeds if input_ids is None else input_ids
    names = inspect.signature(module.forward).parameters
    arguments = {"input_ids": input_ids}  # None beside embeddings: some forwards require the argument
    if inputs_embeds is not None:
        arguments["inputs_embeds"] = inputs_embeds.clone()  # CTRL scales it in place
    ones = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    optional = {"attention_mask": ones, "decoder_input_ids": ones, "use_cache": False}
    if keeps_rope_deltas(module):
        optional["position_ids"] = ones.cumsum(1) - 1
    return arguments | {k: v for k, v in optional.items() if k in names}


def _scale(module, table, calls, step, input_ids=None, inputs_embeds=None) -> float:
    """The change in the input of the first module whose output changes, per unit change of the embeddings."""
    changes = []

    def observe(i, *call):
        previous = calls[i] if i < len(calls) else (None, None)
        if any(x is None or y is None or x.shape != y.shape for x, y in zip(previous, call)):
            return
        if not torch.equal(call[1], previous[1]):
            changes.append((call[0].double() - previous[0].double()) / step)
            raise _Reached

    try:
        if input_ids is not None:
            _call(module, table, observe=observe, add=step, input_ids=input_ids)
        else:
            _call(module, table, observe=observe, inputs_embeds=inputs_embeds + step)
    except _Reached:
        pass
    if not changes:
        return 1.0
    change = changes[0]
    scale = change.median().item()
    if scale <= 0 or (change - scale).abs().max() > 0.05 * scale:  # not a pure scale: mixed or normalised
        return 1.0
    return _exact(scale, module, change.shape[-1])


def _exact(scale, module, width):
    """The exact value of a measured factor: the model's own setting within 1% of it, or else the measured value."""
    settings = [
        v for part in (module, module.base_model) for v in (*vars(part).values(), *part.config.to_dict().values())
    ]
    candidates = [1.0, width**0.5, *(float(v) for v in settings if isinstance(v, float))]
    return next((v for v in candidates if abs(scale - v) <= 0.01 * scale), scale)


def _difference(outputs, expected) -> str | None:
    for a, b in zip(outputs, expected):
        if a.shape != b.shape:
            return "gives outputs of another shape for the embeddings of the same tokens"
        if bool(((a - b).abs() > torch.finfo(b.dtype).eps ** 0.5 * b.abs().max()).any()):
            return "gives other outputs for the embeddings of the same tokens"
    return None


def _tensor(value):
    for x in value if isinstance(value, tuple) else (value,):
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().clone()
    return None


def _described(error):
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__} ({lines[0][:120]})"
