"""A soft prompt and token embeddings with a low-rank update per position, written in one pass."""

import os

import torch
from torch import Tensor

from ..implementations import Implementations, check_numbers, no_second_derivative, without_autocast

__all__ = ["decomposed_prompt_embedding"]

# Each implementation has forward and backward. If it also has backward_low_rank, that computes the gradients of a and b
# up to rank MAX_RANK, without the gradient of a @ b, (K, s, d), in memory.
implementations = Implementations(__name__)

_NAME = "decomposed_prompt_embedding"
_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    f"{_NAME}(Tensor input_ids, Tensor weight, Tensor prompt, Tensor? a, Tensor? b, Tensor? delta, float scale, float"
    " embed_scale, Tensor? offsets, bool insert_after_first, Tensor? adapter_ids, str impl) -> Tensor"
)
_lib.define(
    f"{_NAME}_backward(Tensor grad, SymInt adapters, SymInt virtual, SymInt positions, Tensor? a, Tensor? b, float"
    " scale, Tensor? offsets, bool insert_after_first, Tensor? adapter_ids, bool need_prompt, bool need_delta, str"
    " impl) -> (Tensor, Tensor, Tensor, Tensor)"
)


def decomposed_prompt_embedding(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    delta: Tensor | None = None,
    scale: float = 1.0,
    embed_scale: float = 1.0,
    offsets: Tensor | None = None,
    insert_after_first: bool = False,
    adapter_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Embed tokens with a low-rank update that depends on their position, behind a soft prompt.

    ``out[:, :m] = prompt``; ``out[:, m + j] = embed_scale * weight[input_ids[:, j]] + scale * (a @ b)[j - offset]``.
    One pass, without a (B, L, d) temporary or a concatenation. Decomposed prompt tuning (DePT), arXiv 2309.05173,
    section 2.2; the authors' code has ``scale = 8 / sqrt(r)``.

    Args:
        input_ids: (B, L) int32 or int64 in [0, V).
        weight: (V, d) embedding table; float32, float16, bfloat16 or float64.
        prompt: (m, d), or (K, m, d) for K adapters; in ``weight``'s dtype or float32. m may be 0.
        a: (s, r) or (K, s, r), with L <= s; the dtype of ``a``, ``b`` and ``delta`` is ``weight``'s or float32, as for
            ``prompt``.
        b: (r, d) or (K, r, d).
        delta: (s, d) or (K, s, d), in place of ``a`` and ``b``: a precomputed ``scale * a @ b``.
        scale: factor of the low-rank update; not applied to ``delta``.
        embed_scale: factor of the embedding, for models that scale it outside of the embedding module.
        offsets: (B,) int32 or int64 in [0, L]: row i of ``a`` goes to token ``offsets + i``, for left-padded inputs.
            Tokens before the offset get no update. None: 0.
        insert_after_first: put the prompt after the first token instead of before it, for models that pool the first
            token.
        adapter_ids: (B,) int32 or int64 in [-1, K): the adapter of each row. -1: none; the prompt of that row is 0, to
            be masked by the caller, and its tokens get no update. Required if K > 1.
        impl: ``"auto"``, or ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.

    Returns:
        (B, m + L, d), contiguous, in ``weight``'s dtype; sums are in float32 (float64 for a float64 ``weight``).

    Gradients go to ``prompt``, ``a``, ``b`` or ``delta``, summed over the batch in a fixed order, and to ``weight``
    (dense) if it requires one; a frozen table costs nothing.

    Values of ``input_ids``, ``offsets`` and ``adapter_ids`` are checked on the CPU. On a GPU the check would
    synchronize with the device, so it runs only if the environment variable ``PEFT_KERNELS_DEBUG`` is 1.

    Raises:
        ValueError: invalid shapes, devices or values, or a named implementation that cannot run here; the message says
            why.
        TypeError: invalid dtypes.
    """
    implementations.check(_NAME, impl)
    check_numbers(_NAME, scale=scale, embed_scale=embed_scale)
    _check(input_ids, weight, prompt, a, b, delta, offsets, adapter_ids)
    wide = torch.promote_types(weight.dtype, torch.float32)
    parameters = [_stacked(x, wide) for x in (prompt, a, b, delta)]
    insert_after_first = insert_after_first and input_ids.shape[1] > 0
    return torch.ops.peft_kernels.decomposed_prompt_embedding.default(
        input_ids, weight, *parameters, scale, embed_scale, offsets, insert_after_first, adapter_ids, impl
    )


def _stacked(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns ``x`` in ``dtype`` with a leading adapter dimension."""
    return x if x is None else x.to(dtype) if x.ndim == 3 else x.to(dtype)[None]


def _check(input_ids, weight, prompt, a, b, delta, offsets, adapter_ids):
    if weight.ndim != 2:
        raise ValueError(f"{_NAME}: weight must be (V, d), got {tuple(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"{_NAME}: weight must be float32, float16, bfloat16 or float64, got {weight.dtype}")
    if input_ids.ndim != 2:
        raise ValueError(f"{_NAME}: input_ids must be (B, L), got {tuple(input_ids.shape)}")
    if (delta is None) == (a is None) or (a is None) != (b is None):
        names = [name for name, x in (("a", a), ("b", b), ("delta", delta)) if x is not None]
        raise ValueError(f"{_NAME}: pass either a and b, or delta, got {names or 'none of them'}")
    batch, length = input_ids.shape
    width = weight.shape[1]
    parameters = {name: x for name, x in (("prompt", prompt), ("a", a), ("b", b), ("delta", delta)) if x is not None}
    for name, x in parameters.items():
        if x.dtype not in (weight.dtype, torch.float32):
            raise TypeError(f"{_NAME}: {name} must be {weight.dtype} as weight is, or float32, got {x.dtype}")
        if x.ndim != prompt.ndim or x.ndim not in (2, 3):
            raise ValueError(
                f"{_NAME}: {', '.join(parameters)} must all have 2 dimensions, or 3 with stacked adapters, got {name}"
                f" {tuple(x.shape)}"
            )
        if x.ndim == 3 and x.shape[0] != prompt.shape[0]:
            raise ValueError(
                f"{_NAME}: {name} must have the {prompt.shape[0]} adapters of prompt, got {tuple(x.shape)}"
            )
        if name != "a" and x.shape[-1] != width:
            raise ValueError(f"{_NAME}: {name} must be {width} wide as weight is, got {tuple(x.shape)}")
    if a is not None and a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"{_NAME}: a (s, r) and b (r, d) must share their rank r, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    positions = (a if delta is None else delta).shape[-2]
    if length > positions:
        raise ValueError(
            f"{_NAME}: input_ids has {length} tokens, but {'a' if delta is None else 'delta'} has rows for {positions}"
        )
    if adapter_ids is None and prompt.ndim == 3 and prompt.shape[0] != 1:
        raise ValueError(f"{_NAME}: adapter_ids must select among the {prompt.shape[0]} adapters of prompt, got None")
    for name, x in (("input_ids", input_ids), ("offsets", offsets), ("adapter_ids", adapter_ids)):
        if x is None:
            continue
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{_NAME}: {name} must be int32 or int64, got {x.dtype}")
        if name != "input_ids" and x.shape != (batch,):
            raise ValueError(f"{_NAME}: {name} must be ({batch},), got {tuple(x.shape)}")
    for name, x in {"input_ids": input_ids, "offsets": offsets, "adapter_ids": adapter_ids, **parameters}.items():
        if x is not None and x.device != weight.device:
            raise ValueError(f"{_NAME}: {name} must be on {weight.device} as weight is, got {x.device}")


def _check_values(input_ids, weight, prompt, offsets, adapter_ids):
    limits = (
        ("input_ids", input_ids, 0, weight.shape[0]),
        ("offsets", offsets, 0, input_ids.shape[1] + 1),
        ("adapter_ids", adapter_ids, -1, prompt.shape[0]),
    )
    for name, x, low, end in limits:
        if x is not None and x.numel():
            smallest, largest = (int(v) for v in x.aminmax())
            if smallest < low or largest >= end:
                raise ValueError(f"{_NAME}: {name} must lie in [{low}, {end}), got values from {smallest} to {largest}")


@torch.library.impl(_lib, _NAME, "CompositeExplicitAutograd")
def _forward(
    input_ids, weight, prompt, a, b, delta, scale, embed_scale, offsets, insert_after_first, adapter_ids, impl
):
    if weight.device.type == "cpu" or os.environ.get("PEFT_KERNELS_DEBUG") == "1":
        _check_values(input_ids, weight, prompt, offsets, adapter_ids)
    implementation = implementations.resolve(_NAME, impl, weight.device.type, weight.dtype)
    with without_autocast(weight.device.type):
        return implementation.forward(
            input_ids, weight, prompt, a, b, delta, scale, embed_scale, offsets, insert_after_first, adapter_ids
        )


@torch.library.impl(_lib, f"{_NAME}_backward", "CompositeExplicitAutograd")
def _backward(
    grad, adapters, virtual, positions, a, b, scale, offsets, insert_after_first, adapter_ids, need_prompt, need_delta,
    impl,
):  # fmt: skip
    """Returns the gradients of prompt, a, b and delta; empty if not needed.

    The gradient of b needs a, and the gradient of a needs b: passing a requests the gradient of b, and vice versa.
    """
    implementation = implementations.resolve(_NAME, impl, grad.device.type, grad.dtype)
    sizes, options = (adapters, virtual, positions), (offsets, insert_after_first, adapter_ids)
    grad_a = grad_b = None
    rank = 0 if a is None and b is None else b.shape[1] if a is None else a.shape[2]
    if 0 < rank <= getattr(implementation, "MAX_RANK", 0) and not need_delta:
        grad_prompt, grad_a, grad_b = implementation.backward_low_rank(grad, *sizes, a, b, scale, *options, need_prompt)
        grad_delta = None
    else:
        grad_prompt, grad_delta = implementation.backward(
            grad, *sizes, *options, need_prompt, need_delta or a is not None or b is not None
        )
        with without_autocast(grad.device.type):
            if b is not None:
                grad_a = scale * (grad_delta @ b.mT)
            if a is not None:
                grad_b = scale * (a.mT @ grad_delta)
    grads = grad_prompt, grad_a, grad_b, grad_delta if need_delta else None
    return tuple(_wide(grad, 0) if x is None else x for x in grads)


@torch.library.register_fake(f"peft_kernels::{_NAME}", lib=_lib)
def _(input_ids, weight, prompt, a, b, delta, scale, embed_scale, offsets, insert_after_first, adapter_ids, impl):
    return weight.new_empty(input_ids.shape[0], prompt.shape[1] + input_ids.shape[1], weight.shape[1])


@torch.library.register_fake(f"peft_kernels::{_NAME}_backward", lib=_lib)
def _(
    grad, adapters, virtual, positions, a, b, scale, offsets, insert_after_first, adapter_ids, need_prompt, need_delta,
    impl,
):  # fmt: skip
    width = grad.shape[2]
    grad_prompt = _wide(grad, adapters, virtual, width) if need_prompt else _wide(grad, 0)
    grad_a = _wide(grad, 0) if b is None else _wide(grad, adapters, positions, b.shape[1])
    grad_b = _wide(grad, 0) if a is None else _wide(grad, adapters, a.shape[2], width)
    return grad_prompt, grad_a, grad_b, _wide(grad, adapters, positions, width) if need_delta else _wide(grad, 0)


def _wide(like: Tensor, *shape) -> Tensor:
    return like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _setup_context(ctx, inputs, output):
    input_ids, weight, prompt, a, b, delta, ctx.scale, ctx.embed_scale, offsets, *rest = inputs
    ctx.insert_after_first, adapter_ids, ctx.impl = rest
    ctx.sizes = prompt.shape[0], prompt.shape[1], (a if delta is None else delta).shape[1]
    ctx.rows = weight.shape[0]
    _, need_weight, _, need_a, need_b, *_ = ctx.needs_input_grad
    ctx.save_for_backward(
        input_ids if need_weight else None, a if need_b else None, b if need_a else None, offsets, adapter_ids
    )


def _autograd(ctx, grad):
    input_ids, a, b, offsets, adapter_ids = ctx.saved_tensors
    _, need_weight, need_prompt, need_a, need_b, need_delta, *_ = ctx.needs_input_grad
    grad_weight = _embedding_gradient(ctx, grad, input_ids) if need_weight else None
    options = offsets, ctx.insert_after_first, adapter_ids, need_prompt, need_delta, ctx.impl
    grads = torch.ops.peft_kernels.decomposed_prompt_embedding_backward.default(
        grad, *ctx.sizes, a, b, ctx.scale, *options
    )
    needs = need_prompt, need_a, need_b, need_delta
    return None, grad_weight, *(x if needed else None for x, needed in zip(grads, needs)), *(None,) * 6


def _embedding_gradient(ctx, grad, input_ids):
    virtual, first = ctx.sizes[1], int(ctx.insert_after_first)
    tokens = torch.cat([grad[:, :first], grad[:, first + virtual :]], 1) if first else grad[:, virtual:]
    return torch.ops.aten.embedding_dense_backward(ctx.embed_scale * tokens, input_ids, ctx.rows, -1, False)


torch.library.register_autograd(f"peft_kernels::{_NAME}", _autograd, setup_context=_setup_context, lib=_lib)
no_second_derivative(_lib, "decomposed_prompt_embedding_backward")
