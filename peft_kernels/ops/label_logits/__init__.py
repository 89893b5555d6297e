"""The logits of a few label words at one position of every text, without computing those of the whole vocabulary."""

import os

import torch
from torch import Tensor

from ..implementations import Implementations, no_second_derivative, without_autocast

__all__ = ["label_logits"]

# Each implementation has forward(hidden, weight, label_ids, bias, positions) -> (B, C, w) logits of the words in at
# least float32, -inf where label_ids is -1; and backward(grad_words, weight, label_ids) -> (B, H) gradient of the
# gathered rows in grad_words' dtype.
implementations = Implementations(__name__, "reference", "cpp", "triton")

REDUCTIONS = ("max", "mean", "logsumexp")

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "label_logits(Tensor hidden, Tensor weight, Tensor label_ids, Tensor? bias, Tensor? positions, str impl) -> Tensor"
)
_lib.define("label_logits_backward(Tensor grad_words, Tensor weight, Tensor label_ids, str impl) -> Tensor")


def label_logits(
    hidden: Tensor,
    weight: Tensor,
    label_ids: Tensor,
    *,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    reduce: str = "max",
    impl: str = "auto",
) -> Tensor:
    """Compute a logit per class from those of its label words.

    ``out[b, c] = reduce_w(hidden[b, positions[b]] . weight[label_ids[c, w]] + bias[label_ids[c, w]])``. Decoder tuning
    (DecT), arXiv 2212.08408, section 3.1, reduces by the maximum.

    Args:
        hidden: (B, S, H) with ``positions``, or (B, H); float32, float16, bfloat16 or float64.
        weight: (V, H), the output embedding, in ``hidden``'s dtype.
        label_ids: (C, w) int32 or int64 in [-1, V): the words of each class, at least one per class; -1: no word.
        bias: (V,) in ``hidden``'s dtype or float32, or None.
        positions: (B,) int32 or int64 in [0, S): the position of the mask token in each text.
        reduce: reduction over the words of a class: ``"max"``, ``"mean"`` or ``"logsumexp"``.
        impl: ``"auto"``, or ``"reference"``, ``"cpp"`` or ``"triton"``.

    Returns:
        (B, C) float32 (float64 for float64 inputs), without a (B, S, V) or (B, V) temporary.

    Gradients go to ``hidden``, ``weight`` and ``bias``; a frozen table costs nothing. If several words share the
    largest logit, the first takes the gradient.

    Values of ``label_ids`` and ``positions`` are checked on the CPU. On a GPU the check would synchronize with the
    device, so it runs only if the environment variable ``PEFT_KERNELS_DEBUG`` is 1.

    Raises:
        ValueError: invalid shapes, devices or values, a class without words, or a named implementation that cannot run
            here.
        TypeError: invalid dtypes.
    """
    name = "label_logits"
    implementations.check(name, impl)
    _check(name, hidden, weight, label_ids, bias, positions)
    if reduce not in REDUCTIONS:
        raise ValueError(f"{name}: reduce must be one of {list(REDUCTIONS)}, got {reduce!r}")
    words = torch.ops.peft_kernels.label_logits.default(hidden, weight, label_ids, bias, positions, impl)  # [B, C, w]
    if words.shape[2] == 1:
        return words.squeeze(2)
    if reduce == "max":
        return words.gather(2, words.argmax(2, keepdim=True)).squeeze(2)
    if reduce == "logsumexp":
        return words.logsumexp(2)
    is_word = label_ids >= 0
    return words.masked_fill(~is_word, 0).sum(2) / is_word.sum(1)


def _check(name, hidden, weight, label_ids, bias, positions):
    if hidden.ndim not in (2, 3):
        raise ValueError(f"{name}: hidden must be (B, S, H) or (B, H), got {tuple(hidden.shape)}")
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"{name}: hidden must be float32, float16, bfloat16 or float64, got {hidden.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{name}: weight must be (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{name}: weight must be {hidden.dtype} as hidden is, got {weight.dtype}")
    if label_ids.ndim != 2 or label_ids.shape[1] < 1:
        raise ValueError(f"{name}: label_ids must be (C, w) with w at least 1, got {tuple(label_ids.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if bias is not None and bias.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(f"{name}: bias must be {hidden.dtype} as hidden is, or float32, got {bias.dtype}")
    if (positions is None) != (hidden.ndim == 2):
        raise ValueError(
            f"{name}: positions must come with hidden (B, S, H) and not with (B, H), got hidden {tuple(hidden.shape)}"
        )
    if positions is not None and positions.shape != hidden.shape[:1]:
        raise ValueError(f"{name}: positions must be ({hidden.shape[0]},), got {tuple(positions.shape)}")
    for argument, x in (("label_ids", label_ids), ("positions", positions)):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: {argument} must be int32 or int64, got {x.dtype}")
    for argument, x in (("weight", weight), ("label_ids", label_ids), ("bias", bias), ("positions", positions)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name}: {argument} must be on {hidden.device} as hidden is, got {x.device}")


def _check_values(hidden, weight, label_ids, positions):
    """Checks the values in Python: for so few, a single call of a tensor function would cost as much as the logits."""
    classes = label_ids.tolist()
    for c, words in enumerate(classes):
        if max(words) < 0:
            raise ValueError(f"label_logits: label_ids must have a word for every class, got none for class {c}")
    values = {"label_ids": ([word for words in classes for word in words], -1, weight.shape[0])}
    if positions is not None:
        values["positions"] = positions.tolist(), 0, hidden.shape[1]
    for argument, (x, low, end) in values.items():
        if x and not low <= min(x) <= max(x) < end:
            raise ValueError(
                f"label_logits: {argument} must lie in [{low}, {end}), got values from {min(x)} to {max(x)}"
            )


@torch.library.impl(_lib, "label_logits", "CompositeExplicitAutograd")
def _forward(hidden, weight, label_ids, bias, positions, impl):
    if hidden.device.type == "cpu" or os.environ.get("PEFT_KERNELS_DEBUG") == "1":
        _check_values(hidden, weight, label_ids, positions)
    implementation = implementations.resolve("label_logits", impl, hidden.device.type, hidden.dtype)
    with without_autocast(hidden.device.type):
        return implementation.forward(hidden, weight, label_ids, bias, positions)


@torch.library.impl(_lib, "label_logits_backward", "CompositeExplicitAutograd")
def _backward(grad_words, weight, label_ids, impl):
    implementation = implementations.resolve("label_logits", impl, weight.device.type, weight.dtype)
    with without_autocast(weight.device.type):
        return implementation.backward(grad_words, weight, label_ids)


@torch.library.register_fake("peft_kernels::label_logits", lib=_lib)
def _(hidden, weight, label_ids, bias, positions, impl):
    return hidden.new_empty(hidden.shape[0], *label_ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


@torch.library.register_fake("peft_kernels::label_logits_backward", lib=_lib)
def _(grad_words, weight, label_ids, impl):
    return grad_words.new_empty(grad_words.shape[0], weight.shape[1])


def _setup_context(ctx, inputs, output):
    hidden, weight, label_ids, bias, positions, ctx.impl = inputs
    ctx.shape, ctx.bias_dtype = hidden.shape, None if bias is None else bias.dtype
    ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight, label_ids, positions)


def _autograd(ctx, grad_words):
    hidden, weight, label_ids, positions = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    grad_words = grad_words.masked_fill(label_ids < 0, 0)
    ids = label_ids.clamp_min(0).flatten().long()
    grad_hidden = grad_weight = grad_bias = None
    if need_hidden:
        grad_hidden = torch.ops.peft_kernels.label_logits_backward.default(grad_words, weight, label_ids, ctx.impl)
        grad_hidden = grad_hidden.to(weight.dtype)  # [B, H]
        if positions is not None:
            indices = _texts(positions), positions.long()
            grad_hidden = grad_hidden.new_zeros(ctx.shape).index_put_(indices, grad_hidden)
    if need_weight:
        rows = hidden if positions is None else hidden[_texts(positions), positions.long()]  # [B, H]
        grads = grad_words.flatten(1).mT @ rows.to(grad_words.dtype)  # [C * w, H]
        grad_weight = grads.new_zeros(weight.shape).index_put_((ids,), grads, accumulate=True).to(weight.dtype)
    if need_bias:
        grads = grad_words.flatten(1).sum(0)  # [C * w]
        grad_bias = grads.new_zeros(weight.shape[0]).index_put_((ids,), grads, accumulate=True).to(ctx.bias_dtype)
    return grad_hidden, grad_weight, None, grad_bias, None, None


def _texts(positions):
    return torch.arange(positions.shape[0], device=positions.device)


torch.library.register_autograd("peft_kernels::label_logits", _autograd, setup_context=_setup_context, lib=_lib)
no_second_derivative(_lib, "label_logits_backward")
