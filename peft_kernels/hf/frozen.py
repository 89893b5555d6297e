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
        TypeError: there is no transformers model.
        ValueError: an adapter adds tokens, or works in the wrapper instead of the model.
    """
    while True:
        if isinstance(model, PeftModel | PeftMixedModel):
            for name, config in model.peft_config.items():
                if config.is_prompt_learning or config.peft_type == "XLORA":
                    raise ValueError(
                        f"{method}: model must have its adapters in its layers, but adapter {name!r} is"
                        f" {config.peft_type.value}, which works in PEFT's wrapper; model.get_base_model() is the model"
                        " without it"
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
    # a pandas table is refused: it has two dimensions and iterates over its column names
    dimensions = (1, 2) if pairs and isinstance(values, np.ndarray) else (1,)
    if not is_ordered(values) or getattr(values, "ndim", 1) not in dimensions:
        raise TypeError(f"{expected}, got {'one string' if isinstance(values, str) else type(values).__name__}")
    texts = list(values)
    are_pairs = pairs and texts and not isinstance(texts[0], str)
    for i, text in enumerate(texts):
        if not (_is_pair(text) if are_pairs else isinstance(text, str)):
            raise TypeError(f"{expected}, got {type(text).__name__} at {i}")
    return [(str(text[0]), str(text[1])) if are_pairs else str(text) for text in texts]


def is_ordered(values) -> bool:
    """Whether ``values`` is an iterable whose order is meaningful."""
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set)


def _is_pair(x) -> bool:
    return is_ordered(x) and hasattr(x, "__getitem__") and len(x) == 2 and all(isinstance(y, str) for y in x)


def max_length_of(model, tokenizer, default: Default) -> int | Default:
    """The most tokens that both the tokenizer and the position table allow; ``default`` if neither has a limit."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < UNLIMITED else []
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and positions > 0:
        embeddings = getattr(model.base_model, "embeddings", None)
        # RoBERTa and its derivatives count from padding_idx + 1
        skips_padding = hasattr(embeddings, "create_position_ids_from_inputs_embeds")
        limits.append(positions - (embeddings.padding_idx + 1 if skips_padding else 0))
    return min(limits, default=default)


def padded_behind(attention_mask: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The mask and other (B, S) tensors with padding moved behind the tokens, whose positions then start at 0."""
    order = (attention_mask != 0).int().sort(dim=1, descending=True, stable=True).indices
    return tuple(x if x is None else x.gather(1, order) for x in (attention_mask, *tensors))


def integer(method: str, argument: str, value, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``; any integer type is accepted."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{method}: {argument} must be an integer of at least {minimum}, got {value!r}")
    if value.__index__() < minimum:
        raise ValueError(f"{method}: {argument} must be at least {minimum}, got {value!r}")
    return value.__index__()


def class_indices(method: str, labels) -> list[int]:
    """The labels of texts as ints.

    Raises:
        ValueError: a label is not a whole number: a float with a fraction, a name, or a one-hot row.
    """
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    values = np.asarray(labels if hasattr(labels, "__array__") else list(labels))
    expected = f"{method}: labels must be one class index for each text"
    if values.ndim != 1:
        raise ValueError(f"{expected}, got an array of shape {values.shape}")
    if values.size and values.dtype.kind not in "iuf":
        raise ValueError(f"{expected}, got {values.dtype.name} such as {values.tolist()[0]!r}")
    if values.size and not (np.isfinite(values).all() and (values == values.round()).all()):
        target = next(x for x in values.tolist() if x != x or x in (np.inf, -np.inf) or x != round(x))
        raise ValueError(f"{expected}, got {target}: a regression has no classes")
    return [int(x) for x in values.tolist()]


def check_labels(method: str, labels: Tensor, rows: int, classes: int) -> Tensor:
    """``labels`` as (rows,) int64.

    Values are checked only on a CPU, because a check on a GPU would synchronize, and not under ``torch.compile``.
    """
    if labels.shape != (rows,):
        raise ValueError(f"{method}: labels must be ({rows},), one class index for each row, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"{method}: labels must be integers, the class indices, got {labels.dtype}; regression is not supported"
        )
    readable = labels.device.type == "cpu" and len(labels) and not torch.compiler.is_compiling()
    if readable and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(
            f"{method}: labels must lie in [0, {classes}), got values from {int(labels.min())} to {int(labels.max())}"
        )
    return labels.long()


# id of a model -> the number of contexts that keep it in eval mode, and its modules that were in training mode
_evaluated: dict[int, tuple[int, list[nn.Module]]] = {}
_lock = threading.Lock()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context with ``model`` in eval mode; the last thread that leaves restores every module's mode."""
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
