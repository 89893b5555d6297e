"""The logits of a few label words at one position of every text, without computing those of the whole vocabulary."""

from typing import Protocol

import torch
from torch import Tensor

from ..arguments import FLOATS, INTEGERS, Argument, Arguments, values_are_checked
from ..implementations import Implementation, Implementations, no_second_derivative, without_autocast

__all__ = ["label_logits"]


class LabelLogitsImplementation(Implementation, Protocol):
    def forward(self, hidden, weight, label_ids, bias, positions) -> Tensor:
        """Returns the logits of the words, (B, C, w), in at least float32; -inf where label_ids is -1."""

    def backward(self, grad_words, weight, label_ids) -> Tensor:
        """Returns the gradient of the rows at the positions, (B, H), in grad_words' dtype."""


implementations = Implementations(__name__, "reference", "cpp", "triton")

ARGUMENTS = Arguments(
    hidden=Argument("B S H | B H", FLOATS),
    weight=Argument("V H", like="hidden"),
    label_ids=Argument("C w", INTEGERS, values="[-1, V)", at_least_1="w"),
    bias=Argument("V", like="hidden", or_float32=True, optional=True),
    positions=Argument("B", INTEGERS, values="[0, S)", optional=True),
)
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
    sizes = ARGUMENTS.check(name, hidden, weight, label_ids, bias, positions)
    if (positions is None) != (sizes.S is None):
        raise ValueError(
            f"{name}: positions must come with hidden (B, S, H) and not with (B, H), got hidden {tuple(hidden.shape)}"
        )


def _check_values(hidden, weight, label_ids, positions):
    name, V, S = "label_logits", weight.shape[0], hidden.shape[1]
    lists = ARGUMENTS.check_values(name, label_ids=label_ids, positions=positions, V=V, S=S)
    for c, words in enumerate(lists.get("label_ids") or label_ids.tolist()):
        if max(words) < 0:
            raise ValueError(f"{name}: label_ids must have a word for every class, got none for class {c}")


@torch.library.impl(_lib, "label_logits", "CompositeExplicitAutograd")
def _forward(hidden, weight, label_ids, bias, positions, impl):
    if values_are_checked(hidden):
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
