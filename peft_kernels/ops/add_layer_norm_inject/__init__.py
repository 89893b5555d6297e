"""The residual add and the norm between two transformer layers, fused with the next layer's special-token vectors."""

import torch
from torch import Tensor

from ..implementations import Implementations, check_numbers, no_second_derivative
from ..special_tokens import check_injection, check_injection_values

__all__ = ["add_inject_layer_norm", "add_layer_norm_inject"]

# Each implementation has forward(x, residual, weight, bias, vectors, slots, adapter_ids, eps, rms, pre, dropout_p,
# seed, keep) -> out, sum, mean, rstd; and backward(grad, grad_sum, sum, mean, rstd, weight, slots, adapter_ids,
# adapters, vectors, rms, pre, dropout_p, seed, need_x, need_vectors) -> gradient of x and residual, gradient of
# vectors. A gradient that is not needed is None. weight, bias and vectors are float32 (float64 if x is), and
# contiguous. mean is None with rms. With keep=False mean and rstd are None, and so is sum unless pre.
implementations = Implementations(__name__)

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "add_layer_norm_inject(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? vectors, Tensor? slots,"
    " Tensor? adapter_ids, float eps, bool rms, bool pre, float dropout_p, Tensor? seed, bool keep, str impl) ->"
    " (Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "add_layer_norm_inject_backward(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd, Tensor weight,"
    " Tensor? slots, Tensor? adapter_ids, SymInt adapters, SymInt vectors, bool rms, bool pre, float dropout_p, Tensor?"
    " seed, bool need_x, bool need_weight, bool need_bias, bool need_vectors, str impl) -> (Tensor, Tensor, Tensor,"
    " Tensor)"
)


def add_layer_norm_inject(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    vectors: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    eps: float = 1e-12,
    rms: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    adapter_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute ``special_token_add(layer_norm(x + residual), vectors, slots)`` in one pass, for post-norm layers.

    Layer normalisation: arXiv 1607.06450; RMS norm: arXiv 1910.07467; the vectors: special token adaptation (PASTA),
    arXiv 2210.04382.

    Args:
        x: (B, S, d); float32, float16, bfloat16 or float64.
        residual: (B, S, d), in ``x``'s dtype.
        weight: (d,), in ``x``'s dtype or float32.
        bias: (d,), or None.
        vectors: (P, d) or (K, P, d), as in ``special_token_add``. None: nothing is added.
        slots: (B, k), as in ``special_token_add``; required with ``vectors``.
        eps: added to the variance, or to the mean square.
        rms: divide by the root mean square, without subtracting the mean.
        dropout_p: as in ``special_token_add``; applies to the vectors, not to ``x``.
        seed: as in ``special_token_add``.
        adapter_ids: as in ``special_token_add``.
        impl: ``"auto"``, or ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.

    Returns:
        (B, S, d) in ``x``'s dtype, contiguous. The sum is rounded to ``x``'s dtype, as in separate operations;
        everything after it is float32 (float64 for a float64 ``x``) until the result is rounded.

    The sum, and the mean and reciprocal standard deviation of every row, are saved for backward. A frozen ``weight`` or
    ``bias`` costs nothing. Gradients are summed in a fixed order.

    Raises:
        ValueError: invalid shapes, devices or values, or a named implementation that cannot run here; the message says
            why.
        TypeError: invalid dtypes.
    """
    arguments = x, residual, weight, bias, vectors, slots, eps, rms, False, dropout_p, seed, adapter_ids, impl
    return _apply("add_layer_norm_inject", *arguments)[0]


def add_inject_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    vectors: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    adapter_ids: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute ``h = special_token_add(x + residual, vectors, slots)`` and its norm in one pass, for pre-norm layers.

    Arguments, gradients and errors are those of ``add_layer_norm_inject``.

    Returns:
        ``layer_norm(h)`` and ``h``, both (B, S, d) in ``x``'s dtype, contiguous.
    """
    arguments = x, residual, weight, bias, vectors, slots, eps, rms, True, dropout_p, seed, adapter_ids, impl
    return _apply("add_inject_layer_norm", *arguments)[:2]


def _apply(name, x, residual, weight, bias, vectors, slots, eps, rms, pre, dropout_p, seed, adapter_ids, impl):
    implementations.check(name, impl)
    check_numbers(name, eps=eps)
    _check(name, x, residual, weight, bias)
    if (vectors is None) != (slots is None):
        raise ValueError(
            f"{name}: vectors and slots must come together, got {'slots' if vectors is None else 'vectors'} alone"
        )
    if vectors is None:
        dropout_p, seed, adapter_ids = 0.0, None, None
    else:
        vectors, seed = check_injection(name, "x", x, vectors, slots, dropout_p, seed, adapter_ids)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(wide), bias if bias is None else bias.to(wide)
    tensors = [t for t in (x, residual, weight, bias, vectors) if t is not None]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return torch.ops.peft_kernels.add_layer_norm_inject.default(
        x, residual, weight, bias, vectors, slots, adapter_ids, eps, rms, pre, dropout_p, seed, keep, impl
    )


def _check(name, x, residual, weight, bias):
    if x.ndim != 3:
        raise ValueError(f"{name}: x must be (B, S, d), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"{name}: x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if residual.shape != x.shape:
        raise ValueError(f"{name}: residual must be {tuple(x.shape)} as x is, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"{name}: residual must be {x.dtype} as x is, got {residual.dtype}")
    for argument, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != x.shape[2:]:
            raise ValueError(f"{name}: {argument} must be ({x.shape[2]},), got {tuple(t.shape)}")
        if t is not None and t.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name}: {argument} must be {x.dtype} as x is, or float32, got {t.dtype}")
    for argument, t in (("residual", residual), ("weight", weight), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: {argument} must be on {x.device} as x is, got {t.device}")


@torch.library.impl(_lib, "add_layer_norm_inject", "CompositeExplicitAutograd")
def _forward(x, residual, weight, bias, vectors, slots, adapter_ids, eps, rms, pre, dropout_p, seed, keep, impl):
    name = "add_inject_layer_norm" if pre else "add_layer_norm_inject"
    if vectors is not None:
        check_injection_values(name, x.shape[1], vectors, slots, adapter_ids)
    weight, bias, vectors = (t if t is None else t.contiguous() for t in (weight, bias, vectors))
    implementation = implementations.resolve(name, impl, x.device.type, x.dtype)
    results = implementation.forward(
        x, residual, weight, bias, vectors, slots, adapter_ids, eps, rms, pre, dropout_p, seed, keep
    )
    return tuple((x if i < 2 else weight).new_empty(0) if t is None else t for i, t in enumerate(results))


@torch.library.impl(_lib, "add_layer_norm_inject_backward", "CompositeExplicitAutograd")
def _backward(
    grad, grad_sum, sum, mean, rstd, weight, slots, adapter_ids, adapters, vectors, rms, pre, dropout_p, seed, need_x,
    need_weight,
    need_bias, need_vectors, impl,
):  # fmt: skip
    """Returns the gradients of x and residual (one tensor), weight, bias and vectors; empty if not needed."""
    implementation = implementations.resolve("add_layer_norm_inject", impl, grad.device.type, grad.dtype)
    weight = weight.contiguous()
    grad_x, grad_vectors = None, None
    if need_x or need_vectors:
        grad_x, grad_vectors = implementation.backward(
            grad, grad_sum, sum, None if rms else mean, rstd, weight, slots, adapter_ids, adapters, vectors, rms, pre,
            dropout_p, seed, need_x, need_vectors,
        )  # fmt: skip
    grad_weight = grad_bias = None
    if need_weight:
        centred = sum.to(weight.dtype) if rms else sum.to(weight.dtype) - mean[..., None]
        grad_weight = (grad * (centred * rstd[..., None])).sum((0, 1))
    if need_bias:
        grad_bias = grad.sum((0, 1), dtype=weight.dtype)
    results = grad_x, grad_weight, grad_bias, grad_vectors
    return tuple((grad if i == 0 else weight).new_empty(0) if t is None else t for i, t in enumerate(results))


@torch.library.register_fake("peft_kernels::add_layer_norm_inject", lib=_lib)
def _(x, residual, weight, bias, vectors, slots, adapter_ids, eps, rms, pre, dropout_p, seed, keep, impl):
    out = x.new_empty(x.shape)
    return (
        out,
        x.new_empty(x.shape) if keep or pre else x.new_empty(0),
        weight.new_empty(x.shape[:2]) if keep and not rms else weight.new_empty(0),
        weight.new_empty(x.shape[:2]) if keep else weight.new_empty(0),
    )


@torch.library.register_fake("peft_kernels::add_layer_norm_inject_backward", lib=_lib)
def _(
    grad, grad_sum, sum, mean, rstd, weight, slots, adapter_ids, adapters, vectors, rms, pre, dropout_p, seed, need_x,
    need_weight,
    need_bias, need_vectors, impl,
):  # fmt: skip
    width = weight.shape[0]
    return (
        grad.new_empty(grad.shape if need_x else 0),
        weight.new_empty(width if need_weight else 0),
        weight.new_empty(width if need_bias else 0),
        weight.new_empty((adapters, vectors, width) if need_vectors else 0),
    )


def _setup_context(ctx, inputs, output):
    _, _, weight, _, vectors, slots, adapter_ids, _, ctx.rms, ctx.pre, ctx.dropout_p, seed, _, ctx.impl = inputs
    _, sum, mean, rstd = output
    ctx.sizes = (0, 0) if vectors is None else vectors.shape[:2]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(sum, mean, rstd, weight, slots, adapter_ids, seed)


def _autograd(ctx, grad, grad_sum, *_):
    sum, mean, rstd, weight, slots, adapter_ids, seed = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias, need_vectors, *_ = ctx.needs_input_grad
    if not ctx.pre:
        grad_sum = None
    if grad is None and grad_sum is None:
        return (None,) * 14
    if grad is None:
        grad = torch.zeros_like(sum)
    grad_x, *grads = torch.ops.peft_kernels.add_layer_norm_inject_backward.default(
        grad, grad_sum, sum, mean, rstd, weight, slots, adapter_ids, *ctx.sizes, ctx.rms, ctx.pre, ctx.dropout_p, seed,
        need_x or need_residual, need_weight, need_bias, need_vectors, ctx.impl,
    )  # fmt: skip
    grads = [g if needed else None for g, needed in zip(grads, (need_weight, need_bias, need_vectors))]
    return grad_x if need_x else None, grad_x if need_residual else None, *grads, *(None,) * 9


torch.library.register_autograd(
    "peft_kernels::add_layer_norm_inject", _autograd, setup_context=_setup_context, lib=_lib
)
no_second_derivative(_lib, "add_layer_norm_inject_backward")
