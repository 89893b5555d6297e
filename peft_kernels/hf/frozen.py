"""Checks of a user's model, texts and labels for the methods on frozen features."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftMixedModel, PeftModel
from torch import Tensor, nn

from .peft_method import check_pretrained

Default = TypeVar("Default")
UNLIMITED = 10**6  # a tokenizer without a limit reports a huge number


def frozen_model(method: str, model: nn.Module) -> Any:
    """The transformers model inside wrappers of PEFT or ``torch.compile``, with the adapters that are active in it.

    Raises:
        TypeError: there is no transformers model. ValueError: an adapter adds tokens, or works in the wrapper instead
            of the model.
    """
    while True:
        if isinstance(model, PeftModel | PeftMixedModel):
            for name, config in model.peft_config.items():
                if config.is_prompt_learning or config.peft_type == "XLORA":
                    raise ValueError(
                        f"{method}: model must be one whose adapters lie in its layers, but adapter {name!r} is"
                        f" {config.peft_type.value}, which"
                        " works from around the model; model.get_base_model() is the model without it"
                    )
            model = model.base_model.model
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            break
    check_pretrained(method, model)
    return model


def strings(method: str, argument: str, values, *, pairs: bool = False) -> list:
    """A list of strings from any ordered iterable; with ``pairs`` also a list of pairs of strings, as tuples.

    Raises:
        TypeError: ``values`` is one string, a mapping, a set or a table, or an element is not a string.
    """
    expected = f"{method}: {argument} must be a sequence of strings{' or of pairs of strings' if pairs else ''}"
    # a pandas table has two, and iterates over column names
    dimensions = (1, 2) if pairs and isinstance(values, np.ndarray) else (1,)
    if not ordered(values) or getattr(values, "ndim", 1) not in dimensions:
        raise TypeError(f"{expected}, got {'one string' if isinstance(values, str) else type(values).__name__}")
    found = list(values)
    of_pairs = pairs and found and not isinstance(found[0], str)
    for i, x in enumerate(found):
        if not (_is_pair(x) if of_pairs else isinstance(x, str)):
            raise TypeError(f"{expected}, got {type(x).__name__} at {i}")
    return [(str(x[0]), str(x[1])) if of_pairs else str(x) for x in found]


def ordered(values) -> bool:
    """Whether ``values`` is an iterable whose order is meaningful."""
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set)


def _is_pair(x) -> bool:
    return ordered(x) and hasattr(x, "__getitem__") and len(x) == 2 and all(isinstance(y, str) for y in x)


def max_length_of(model, tokenizer, default: Default) -> int | Default:
    """The most tokens that both the tokenizer and the position table allow; ``default`` if neither has a limit."""
    limits = [n for n in (tokenizer.model_max_length,) if n < UNLIMITED]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and positions > 0:
        embeddings = getattr(model.base_model, "embeddings", None)
        # RoBERTa and its derivatives count from padding_idx + 1
        from_padding = hasattr(embeddings, "create_position_ids_from_inputs_embeds")
        limits.append(positions - (embeddings.padding_idx + 1 if from_padding else 0))
    return min(limits, default=default)


def padded_behind(attention_mask: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The mask and other (B, S) tensors with padding moved behind the tokens, so that positions count from the first
    token.
    """
    order = (attention_mask != 0).int().sort(dim=1, descending=True, stable=True).indices
    return tuple(x if x is None else x.gather(1, order) for x in (attention_mask, *tensors))


def whole(method: str, argument: str, value, least: int) -> int:
    """``value`` as an int of at least ``least``; any integer type is accepted."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{method}: {argument} must be an integer of at least {least}, got {value!r}")
    if value.__index__() < least:
        raise ValueError(f"{method}: {argument} must be at least {least}, got {value!r}")
    return value.__index__()


def class_indices(method: str, labels) -> list[int]:
    """The labels of texts as ints.

    Raises:
        ValueError: a label is not a whole number: a float with a fraction, a name, or a one-hot row.
    """
    values = (
        labels.detach().cpu().numpy()
        if isinstance(labels, Tensor)
        else np.asarray(labels if hasattr(labels, "__array__") else list(labels))
    )
    expected = f"{method}: labels must be one class index for each text"
    if values.ndim != 1:
        raise ValueError(f"{expected}, got an array of shape {values.shape}")
    if values.size and values.dtype.kind not in "iuf":
        raise ValueError(f"{expected}, got {values.dtype.name} such as {values.tolist()[0]!r}")
    if values.size and not (np.isfinite(values).all() and (values == values.round()).all()):
        wrong = next(x for x in values.tolist() if x != x or x in (np.inf, -np.inf) or x != round(x))
        raise ValueError(f"{expected}, got {wrong}: a regression has no classes")
    return [int(x) for x in values.tolist()]


def check_labels(method: str, labels: Tensor, rows: int, classes: int) -> Tensor:
    """``labels`` as (rows,) int64.

    Values are checked only on a CPU, because on a GPU that would synchronize, and not in a graph.
    """
    if labels.shape != (rows,):
        raise ValueError(f"{method}: labels must be ({rows},), one class index for each row, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"{method}: labels must be integers, the indices of classes, got {labels.dtype}; regression is not"
            " supported"
        )
    looked_at = labels.device.type == "cpu" and len(labels) and not torch.compiler.is_compiling()
    if looked_at and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(
            f"{method}: labels must lie in [0, {classes}), got values from {int(labels.min())} to {int(labels.max())}"
        )
    return labels.long()


_evaluated: dict[
    int, tuple[int, list[nn.Module]]
] = {}  # by model: calls that keep it in eval mode, modules that were in training
_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context with ``model`` in eval mode; when the last thread leaves, every module's mode is restored."""
    key = id(model)
    with _lock:
        calls, training = _evaluated.get(key, (0, None))
        if training is None:
            training = [m for m in model.modules() if m.training]
            model.eval()
        _evaluated[key] = calls + 1, training
    try:
        yield
    finally:
        with _lock:
            calls, training = _evaluated.pop(key)
            if calls > 1:
                _evaluated[key] = calls - 1, training
            else:
                for module in training:
                    module.training = True
