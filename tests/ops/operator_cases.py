"""A small call of every public operator, for tests of all operators."""

from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """``tensors``: all arguments; ``laid_out``: those whose strides change; ``varying``: those that cannot have a
    stride of 0.
    """

    package: str
    tensors: dict[str, Tensor]
    laid_out: tuple[str, ...]
    options: dict = {}
    varying: tuple[str, ...] = ()


def integers(*values):
    return torch.tensor(values)


def attention():
    keys = {"key": torch.randn(3, 1, 7, 16), "value": torch.randn(3, 1, 7, 16)}
    vectors = {"key_lengths": integers(7, 2, 5), "encoder_index": integers(0, 0, 1, 1, 2, 2)}
    return Case(
        "shared_cross_attention",
        {"query": torch.randn(6, 1, 3, 16), **keys, **vectors},
        tuple(vectors),
        {"return_lse": True},
    )


def label_attention(**rows):
    features = torch.randn(3, 7, 32) if "lengths" in rows else torch.randn(11, 32)
    weights = {name: torch.randn(32, 32) for name in ("w_q", "w_k", "w_v")}
    options = {"num_heads": 2}
    return Case(
        "label_cross_attention",
        {"slots": torch.randn(3, 32), "features": features, **weights, **rows},
        tuple(rows),
        options,
        tuple(rows) if "offsets" in rows else (),
    )


def words(**rows):
    vectors = {"label_ids": integers(*[4, 1, 7], *[2, 5, 0]).view(2, 3), "bias": torch.randn(9), **rows}
    hidden = torch.randn(3, 5, 24) if rows else torch.randn(3, 24)
    return Case(
        "label_logits",
        {"hidden": hidden, "weight": torch.randn(9, 24), **vectors},
        tuple(vectors),
        {"reduce": "logsumexp"},
    )


def scores(**labels):
    vectors = {"radius": torch.randn(3), "scores": torch.randn(4, 3), **labels}
    large = {"features": torch.randn(4, 8), "projection": torch.randn(5, 8), "prototypes": torch.randn(3, 5)}
    return Case("prototype_scores", {**large, **vectors}, tuple(vectors))


def special_ids():
    vectors = {"input_ids": integers(1, 5, 2, 9, 5, 2, 1, 7, 8, 2, 2, 3).view(2, 6), "special_ids": integers(1, 2, 9)}
    vectors["attention_mask"] = integers(1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1).view(2, 6)
    return Case("special_tokens", vectors, tuple(vectors), {"max_slots": 4})


INJECTED = {"slots": integers(0, 3, 5, -1, 2, 1).view(3, 2), "adapter_ids": integers(1, 0, -1)}


def injection(package="special_tokens", options={"dropout_p": 0.3}, **large):  # noqa: B006
    vectors = {"vectors": torch.randn(2, 2, 20), "seed": integers(12345678901), **INJECTED}
    if package == "add_layer_norm_inject":
        vectors |= {"weight": torch.randn(20), "bias": torch.randn(20)}
    return Case(
        package, {**{name: torch.randn(3, 6, 20) for name in large or ("hidden",)}, **vectors}, tuple(vectors), options
    )


def norm():
    return injection("add_layer_norm_inject", x=True, residual=True)


def embedding(**update):
    rows = {
        "input_ids": integers(*[3, 1, 7, 4], *[2, 6, 0, 5], *[1, 1, 3, 8]).view(3, 4),
        "offsets": integers(0, 3, 1),
        "adapter_ids": integers(1, -1, 0),
    }
    parameters = {"prompt": torch.randn(2, 3, 24), **update}
    return Case(
        "decomposed_prompt_embedding", {"weight": torch.randn(9, 24), **rows, **parameters}, (*rows, *parameters)
    )


CASES = {
    "shared_cross_attention": attention,
    "label_cross_attention": lambda: label_attention(lengths=integers(7, 2, 5)),
    "label_cross_attention of joined rows": lambda: label_attention(offsets=integers(0, 3, 3, 11)),
    "label_logits": lambda: words(positions=integers(4, 0, 2)),
    "label_logits of rows": words,
    "prototype_scores": scores,
    "prototype_cross_entropy": lambda: scores(labels=integers(2, 0, 1, 1)),
    "special_token_slots": special_ids,
    "special_token_add": injection,
    "special_token_add_": injection,
    "add_layer_norm_inject": norm,
    "add_inject_layer_norm": norm,
    "decomposed_prompt_embedding": lambda: embedding(delta=torch.randn(2, 5, 24)),
    "decomposed_prompt_embedding of low rank": lambda: embedding(a=torch.randn(2, 5, 3), b=torch.randn(2, 3, 24)),
}


def implementations_of(package):
    return import_module(f"peft_kernels.ops.{package}").implementations


PAIRS = [(name, impl) for name, case in CASES.items() for impl in implementations_of(case().package).names]
