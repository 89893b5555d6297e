"""The head of DecT: a trained projection, frozen prototypes, and a trained radius for every class."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..ops import prototype_objective, prototype_scores
from ..ops.prototype_scores.adam import Adam

CALIBRATIONS = ("official", "logprob", "none")


@dataclass(frozen=True)
class Head:
    """The parameters of a trained classifier."""

    projection: Tensor  # (D, H)
    prototypes: Tensor  # (C, D)
    radius: Tensor  # (C,)

    def __call__(self, features: Tensor, scores: Tensor | None, score_weight: float) -> Tensor:
        """The logits q, (N, C), of features (N, H) and calibrated scores (N, C) or None."""
        return prototype_scores(features, self.projection, self.prototypes, self.radius, scores, weight=score_weight)


def calibrated(scores: Tensor, empty_scores: Tensor | None, calibration: str) -> Tensor:
    """Calibrate ``scores`` (N, C) by the scores of the empty text, ``empty_scores`` (C,).

    ``"official"`` divides logits by ``empty_scores / mean(empty_scores) + 1e-15``, as the authors' code does; a divisor
    near 0 or negative changes order and sign. ``"logprob"`` subtracts log-probabilities over the classes. ``"none"``
    returns ``scores`` unchanged.
    """
    if calibration == "none":
        return scores
    if calibration == "logprob":
        return scores.log_softmax(1) - empty_scores.log_softmax(0)
    return scores / (empty_scores / empty_scores.mean() + 1e-15)


def train(
    features: Tensor,
    labels: Tensor,
    scores: Tensor | None,
    classes: int,
    *,
    dim: int,
    lr: float,
    epochs: int,
    score_weight: float,
    seed: int,
    weights: Tensor | None = None,
) -> tuple[Head, Tensor]:
    """Train a head by Adam on all of ``features`` (N, H) and ``labels`` (N,) in every epoch.

    Returns the head and the loss before each step, (epochs,). The gradient takes two matmuls and one pass over the
    projected rows, without autograd. The projection is stored transposed, as (H, D): with few texts the first matmul is
    then twice as fast. With ``weights`` (N,), whose sum is 1, the loss is a weighted mean, and autograd computes its
    gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    width, device = features.shape[1], features.device

    def uniform(bound, *size):
        return torch.empty(size).uniform_(-bound, bound, generator=generator).to(device)

    projection = uniform(width**-0.5, dim, width).T.contiguous()  # [H, D], as nn.Linear starts
    prototypes = uniform((6 / (classes + dim)) ** 0.5, classes, dim)  # Xavier
    projected = features @ projection  # [N, D]
    members = [labels == k for k in range(classes)]
    radius = torch.stack([_spread(projected[m], None if weights is None else weights[m]) for m in members])
    grad_projection, losses = torch.empty_like(projection), []
    optimizer = Adam([projection, radius], lr)
    objective = prototype_objective(prototypes, scores, labels, weight=score_weight)
    for _ in range(epochs):
        if weights is None:
            torch.mm(features, projection, out=projected)
            loss, grad, grad_radius = objective(projected, radius)
            torch.mm(features.T, grad, out=grad_projection)
        else:
            loss, grad_projection, grad_radius = _weighted(
                features, projection, prototypes, radius, scores, score_weight, labels, weights
            )
        optimizer.step([grad_projection, grad_radius])
        losses.append(loss)
    return Head(projection.T.contiguous(), prototypes, radius), torch.stack(losses) if losses else radius.new_empty(0)


def _weighted(
    features, projection, prototypes, radius, scores, score_weight, labels, weights
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted loss and its gradients with respect to projection (H, D) and radius (C,)."""
    with torch.enable_grad():
        leaves = projection.detach().requires_grad_(), radius.detach().requires_grad_()
        q = prototype_scores(features, leaves[0].T, prototypes, leaves[1], scores, weight=score_weight)
        loss = (cross_entropy(q, labels, reduction="none") * weights).sum()
        grad_projection, grad_radius = torch.autograd.grad(loss, leaves)
    return loss.detach(), grad_projection.contiguous(), grad_radius


def _spread(projected: Tensor, weights: Tensor | None) -> Tensor:
    """The mean distance of a class's texts (n, D) from their mean; 0 for one text."""
    if weights is None:
        return (projected - projected.mean(0)).norm(dim=1).mean()
    share = weights / weights.sum()  # [n]
    return share @ (projected - share @ projected).norm(dim=1)
