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
    """The first layer's input is ``token_scale`` times the embedding module's output, or ``input_scale`` times
    ``inputs_embeds``.
    """

    table: nn.Embedding  # the module that looks input_ids up
    token_scale: float = 1.0
    input_scale: float = 1.0
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
    what = type(module).__name__
    with _undisturbed(module, table):
        ids, filler = _tokens(module, table)
        try:
            expected, calls, used = _call(module, table, input_ids=ids)
        except Exception as error:
            raise ValueError(f"DePT: {what} must take input_ids alone, but raises {_told(error)}") from error
        if used is None:
            raise ValueError(f"DePT: {what} must look its tokens up in its input embedding, but does not call it")
        embeddings = used(ids)
        step = 2.0 ** embeddings.abs().max().float().clamp_min(1e-3).log2().round().item()
        token_scale = _response(module, table, calls, step, input_ids=ids)
        try:
            got, calls, _ = _call(module, table, inputs_embeds=embeddings)
            input_scale = _response(module, table, calls, step, inputs_embeds=embeddings)
            if token_scale != input_scale:
                got, *_ = _call(module, table, inputs_embeds=embeddings * (token_scale / input_scale))
            difference = _difference(got, expected)
        except Exception as error:
            difference, input_scale = f"raises {_told(error)} without them", 1.0
    if difference and (is_causal(module) or is_encoder_decoder(module)):
        raise ValueError(
            f"DePT: {what} reads input_ids for more than their embeddings, which a prompt does not have: it"
            f" {difference}"
        )
    return Reading(used, token_scale, input_scale, bool(difference), filler)


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
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= {f"{name}.{k}": v for k, v in _roles(value).items()}
        elif isinstance(value, int) and str(name).endswith(("token_id", "token_index", "_idx")):
            found[str(name)] = value
    return found


def _call(module, table, *, reach=None, add=0.0, **inputs):
    """The outputs of a forward, the input and output of every leaf module, and the module that looked up the ids.

    ``add`` is added to the embeddings. ``reach(i, took, gave)`` is called after each leaf module.
    """
    calls, used = [], []

    def looked_up(m, args, output):
        used.append(m)
        return output + add if add else None

    def passed(m, args, kwargs, output):
        took, gave = (_tensor(args) if args else _tensor(tuple(kwargs.values()))), _tensor(output)
        if reach is not None:
            reach(len(calls), took, gave)
        calls.append((took, gave))

    handles = []
    for m in module.modules():
        if isinstance(m, nn.Embedding) and m.weight is table.weight:
            if "input_ids" in inputs:
                handles.append(m.register_forward_hook(looked_up))
        elif not any(True for _ in m.children()):
            handles.append(m.register_forward_hook(passed, with_kwargs=True))
    try:
        torch.manual_seed(0)
        output = module(**_arguments(module, **inputs))
    finally:
        for handle in handles:
            handle.remove()
    values = output.values() if hasattr(output, "values") else output
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()], calls, used[0] if used else None


def _arguments(module, input_ids=None, inputs_embeds=None):
    x = inputs_embeds if input_ids is None else input_ids
    names = inspect.signature(module.forward).parameters
    given = {"input_ids": input_ids}  # None beside embeddings: some forwards require the argument
    if inputs_embeds is not None:
        given["inputs_embeds"] = inputs_embeds.clone()  # CTRL scales it in place
    ones = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    others = {"attention_mask": ones, "decoder_input_ids": ones, "use_cache": False}
    if keeps_rope_deltas(module):
        others["position_ids"] = ones.cumsum(1) - 1
    return given | {k: v for k, v in others.items() if k in names}


def _response(module, table, calls, step, input_ids=None, inputs_embeds=None) -> float:
    """The change in the input of the first module whose output changes, per unit change of the embeddings."""
    found = []

    def reach(i, took, gave):
        before = calls[i] if i < len(calls) else (None, None)
        if any(x is None or y is None or x.shape != y.shape for x, y in zip(before, (took, gave))):
            return
        if not torch.equal(gave, before[1]):
            found.append((took.double() - before[0].double()) / step)
            raise _Reached

    try:
        if input_ids is not None:
            _call(module, table, reach=reach, add=step, input_ids=input_ids)
        else:
            _call(module, table, reach=reach, inputs_embeds=inputs_embeds + step)
    except _Reached:
        pass
    if not found:
        return 1.0
    change = found[0]
    scale = change.median().item()
    if scale <= 0 or (change - scale).abs().max() > 0.05 * scale:  # not a pure scale: mixed or normalised
        return 1.0
    return _exact(scale, module, change.shape[-1])


def _exact(scale, module, width):
    """The exact value of a measured factor: the model's own setting within 1% of it, or else the measured value."""
    settings = [
        v for part in (module, module.base_model) for v in (*vars(part).values(), *part.config.to_dict().values())
    ]
    known = [1.0, width**0.5, *(float(v) for v in settings if isinstance(v, float))]
    return next((v for v in known if abs(scale - v) <= 0.01 * scale), scale)


def _difference(got, expected) -> str | None:
    for a, b in zip(got, expected):
        bound = torch.finfo(b.dtype).eps ** 0.5 * b.abs().max()
        if a.shape != b.shape or bool(((a - b).abs() > bound).any()):
            return (
                f"gives {'outputs of another shape' if a.shape != b.shape else 'other outputs'} for the embeddings"
                " of the same tokens"
            )
    return None


def _tensor(value):
    for x in value if isinstance(value, tuple) else (value,):
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().clone()
    return None


def _told(error):
    return (
        f"{type(error).__name__} ({str(error).strip().splitlines()[0][:120] if str(error).strip() else 'no message'})"
    )
