"""Scores of normalised features by their distance to class prototypes, and the cross-entropy of these scores."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..implementations import Implementations, check_numbers, no_second_derivative, without_autocast

__all__ = ["prototype_cross_entropy", "prototype_objective", "prototype_scores"]

# Each implementation has forward(projected, prototypes, radius, scores, weight) -> q; backward(grad, projected,
# prototypes) -> gradients of projected and prototypes; and cross_entropy(projected, prototypes, radius, scores, weight,
# labels) -> loss (), its gradients with respect to projected and radius. All tensors but labels have one dtype and are
# contiguous.
implementations = Implementations(__name__, "reference", "cpp", "triton")

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "prototype_scores(Tensor projected, Tensor prototypes, Tensor radius, Tensor? scores, float weight, str impl) ->"
    " Tensor"
)
_lib.define("prototype_scores_backward(Tensor grad, Tensor projected, Tensor prototypes, str impl) -> (Tensor, Tensor)")
_lib.define(
    "prototype_cross_entropy(Tensor projected, Tensor prototypes, Tensor radius, Tensor? scores, float weight, Tensor"
    " labels, str impl) -> (Tensor, Tensor, Tensor)"
)


def prototype_scores(
    features: Tensor,
    projection: Tensor,
    prototypes: Tensor,
    radius: Tensor,
    scores: Tensor | None = None,
    *,
    weight: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Score projected, normalised features by their distance to class prototypes.

    ``q[i, k] = -||normalise(projection @ features[i]) - prototypes[k]||_2 + radius[k] + weight * scores[i, k]``;
    decoder tuning (DecT), arXiv 2212.08408, equations 3 to 5.

    Args:
        features: (N, H) float32 or float64.
        projection: (D, H), in ``features``'s dtype, like all tensors below.
        prototypes: (C, D), not normalised.
        radius: (C,)
        scores: (N, C), the model's own scores; None: their term is left out.
        weight: factor of ``scores``, lambda in the paper.
        impl: ``"auto"``, or ``"reference"``, ``"cpp"`` or ``"triton"``.

    Returns:
        (N, C), without an (N, C, D) temporary. The gradient of a distance of 0 is 0. A feature projected to 0 stays 0
        and gets no gradient.

    Gradients go to ``features``, ``projection``, ``prototypes`` and ``radius``, not to ``scores``.

    Raises:
        ValueError: invalid shapes or devices, or a named implementation that cannot run here; the message says why.
        TypeError: invalid dtypes.
    """
    name = "prototype_scores"
    _check(name, features, projection, prototypes, radius, scores, impl)
    check_numbers(name, weight=weight)
    with without_autocast(features.device.type):
        projected = features @ projection.mT
    return torch.ops.peft_kernels.prototype_scores.default(projected, prototypes, radius, scores, weight, impl)


def prototype_cross_entropy(
    features: Tensor,
    projection: Tensor,
    prototypes: Tensor,
    radius: Tensor,
    scores: Tensor | None,
    labels: Tensor,
    *,
    weight: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Compute the mean cross-entropy of ``softmax(prototype_scores(...))`` and its gradients in the same pass.

    ``labels`` is (N,) int64 in [0, C). Gradients go to ``features``, ``projection`` and ``radius``: prototypes are
    frozen in DecT. The other arguments and the errors are those of ``prototype_scores``.
    """
    name = "prototype_cross_entropy"
    _check(name, features, projection, prototypes, radius, scores, impl)
    if prototypes.requires_grad:
        raise ValueError(f"{name}: prototypes must not require a gradient; prototype_scores gives one")
    _check_labels(name, "features", features, labels, features.shape[:1])
    check_numbers(name, weight=weight)
    with without_autocast(features.device.type):
        projected = features @ projection.mT
    return torch.ops.peft_kernels.prototype_cross_entropy.default(
        projected, prototypes, radius, scores, weight, labels, impl
    )[0]


def prototype_objective(
    prototypes: Tensor, scores: Tensor | None, labels: Tensor, *, weight: float = 1.0, impl: str = "auto"
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return the loss of ``prototype_cross_entropy`` as a function, for a training loop without autograd.

    The constant arguments are checked once. Arguments and errors are those of ``prototype_cross_entropy``; scores
    (N, C) and labels (N,) determine N.

    Returns:
        A function of the projected features, (N, D) contiguous, and of ``radius`` (C,). It returns the loss (), the
        gradient of the projected features, (N, D), and the gradient of ``radius``, (C,).
    """
    name = "prototype_objective"
    implementations.check(name, impl)
    if prototypes.ndim != 2 or not len(prototypes):
        raise ValueError(f"{name}: prototypes must be (C, D) with at least one row, got {tuple(prototypes.shape)}")
    if scores is not None and scores.shape != (len(labels), len(prototypes)):
        raise ValueError(f"{name}: scores must be ({len(labels)}, {len(prototypes)}), got {tuple(scores.shape)}")
    _check_like(name, "prototypes", prototypes, scores=scores)
    _check_labels(name, "prototypes", prototypes, labels, labels.shape)
    _check_values(name, labels, len(prototypes))
    implementation = implementations.resolve(name, impl, prototypes.device.type, prototypes.dtype)
    prototypes, labels = prototypes.detach().contiguous(), labels.detach().contiguous()
    scores = None if scores is None else scores.detach().contiguous()

    @torch.no_grad()
    def objective(projected: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return implementation.cross_entropy(projected, prototypes, radius, scores, weight, labels)

    return objective


def _check(name, features, projection, prototypes, radius, scores, impl):
    implementations.check(name, impl)
    if features.ndim != 2:
        raise ValueError(f"{name}: features must be (N, H), got {tuple(features.shape)}")
    if projection.ndim != 2 or projection.shape[1] != features.shape[1]:
        raise ValueError(f"{name}: projection must be (D, {features.shape[1]}), got {tuple(projection.shape)}")
    if prototypes.ndim != 2 or prototypes.shape[1] != projection.shape[0] or not len(prototypes):
        raise ValueError(
            f"{name}: prototypes must be (C, {projection.shape[0]}) with at least one row, got"
            f" {tuple(prototypes.shape)}"
        )
    if radius.shape != prototypes.shape[:1]:
        raise ValueError(f"{name}: radius must be ({prototypes.shape[0]},), got {tuple(radius.shape)}")
    if scores is not None and scores.shape != (features.shape[0], prototypes.shape[0]):
        raise ValueError(
            f"{name}: scores must be ({features.shape[0]}, {prototypes.shape[0]}), got {tuple(scores.shape)}"
        )
    _check_like(name, "features", features, projection=projection, prototypes=prototypes, radius=radius, scores=scores)


def _check_like(name, like_name, like, **tensors):
    if like.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: {like_name} must be float32 or float64, got {like.dtype}")
    for argument, x in tensors.items():
        if x is not None and x.dtype != like.dtype:
            raise TypeError(f"{name}: {argument} must be {like.dtype} as {like_name} is, got {x.dtype}")
        if x is not None and x.device != like.device:
            raise ValueError(f"{name}: {argument} must be on {like.device} as {like_name} is, got {x.device}")


def _check_labels(name, like_name, like, labels, shape):
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: labels must be int64, got {labels.dtype}")
    if labels.ndim != 1 or labels.shape != shape or labels.device != like.device:
        raise ValueError(
            f"{name}: labels must be {tuple(shape)} on {like.device} as {like_name} is, got {tuple(labels.shape)} on"
            f" {labels.device}"
        )


def _check_values(name, labels, classes):
    if labels.numel() and (labels.device.type == "cpu" or os.environ.get("PEFT_KERNELS_DEBUG") == "1"):
        low, high = (int(v) for v in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"{name}: labels must lie in [0, {classes}), got values from {low} to {high}")


def _dense(*tensors):
    return (x if x is None else x.contiguous() for x in tensors)


@torch.library.impl(_lib, "prototype_scores", "CompositeExplicitAutograd")
def _forward(projected, prototypes, radius, scores, weight, impl):
    implementation = implementations.resolve("prototype_scores", impl, projected.device.type, projected.dtype)
    with without_autocast(projected.device.type):
        return implementation.forward(*_dense(projected, prototypes, radius, scores), weight)


@torch.library.impl(_lib, "prototype_scores_backward", "CompositeExplicitAutograd")
def _backward(grad, projected, prototypes, impl):
    implementation = implementations.resolve("prototype_scores", impl, projected.device.type, projected.dtype)
    return implementation.backward(*_dense(grad, projected, prototypes))


@torch.library.impl(_lib, "prototype_cross_entropy", "CompositeExplicitAutograd")
def _cross_entropy(projected, prototypes, radius, scores, weight, labels, impl):
    _check_values("prototype_cross_entropy", labels, prototypes.shape[0])
    implementation = implementations.resolve("prototype_cross_entropy", impl, projected.device.type, projected.dtype)
    with without_autocast(projected.device.type):
        return implementation.cross_entropy(*_dense(projected, prototypes, radius, scores), weight, labels)


@torch.library.register_fake("peft_kernels::prototype_scores", lib=_lib)
def _(projected, prototypes, radius, scores, weight, impl):
    return projected.new_empty(projected.shape[0], prototypes.shape[0])


@torch.library.register_fake("peft_kernels::prototype_scores_backward", lib=_lib)
def _(grad, projected, prototypes, impl):
    return projected.new_empty(projected.shape), prototypes.new_empty(prototypes.shape)


@torch.library.register_fake("peft_kernels::prototype_cross_entropy", lib=_lib)
def _(projected, prototypes, radius, scores, weight, labels, impl):
    return projected.new_empty(()), projected.new_empty(projected.shape), radius.new_empty(radius.shape)


def _setup_context(ctx, inputs, output):
    projected, prototypes, _, _, _, ctx.impl = inputs
    ctx.save_for_backward(projected, prototypes)


def _autograd(ctx, grad):
    projected, prototypes = ctx.saved_tensors
    need_projected, need_prototypes, need_radius, *_ = ctx.needs_input_grad
    grad_projected = grad_prototypes = None
    if need_projected or need_prototypes:
        grad_projected, grad_prototypes = torch.ops.peft_kernels.prototype_scores_backward.default(
            grad, projected, prototypes, ctx.impl
        )
    grads = grad_projected if need_projected else None, grad_prototypes if need_prototypes else None
    return *grads, grad.sum(0) if need_radius else None, None, None, None


def _setup_context_of_loss(ctx, inputs, output):
    _, grad_projected, grad_radius = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_projected, grad_radius)


def _autograd_of_loss(ctx, grad, *grads_of_gradients):
    if any(x is not None for x in grads_of_gradients):
        raise NotImplementedError("prototype_cross_entropy: second derivatives are not implemented")
    if grad is None:
        return (None,) * 7
    grad_projected, grad_radius = ctx.saved_tensors
    need_projected, _, need_radius, *_ = ctx.needs_input_grad
    grads = grad * grad_projected if need_projected else None, None, grad * grad_radius if need_radius else None
    return *grads, None, None, None, None


torch.library.register_autograd("peft_kernels::prototype_scores", _autograd, setup_context=_setup_context, lib=_lib)
torch.library.register_autograd(
    "peft_kernels::prototype_cross_entropy", _autograd_of_loss, setup_context=_setup_context_of_loss, lib=_lib
)
no_second_derivative(_lib, "prototype_scores_backward")
