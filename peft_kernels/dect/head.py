"""The trained part of DecT: a projection, frozen prototypes, a radius for every class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import prototype_objective, prototype_scores
from ..ops.prototype_scores.adam import Adam

CALIBRATIONS = ("official", "logprob", "none")


@dataclass(frozen=True)
class Head:
    projection: Tensor  # (D, H)
    prototypes: Tensor  # (C, D)
    radius: Tensor  # (C,)

    def __call__(self, features: Tensor, scores: Tensor | None, score_weight: float) -> Tensor:
        """(N, H) and (N, C) calibrated scores, or none: (N, C)."""
        return prototype_scores(features, self.projection, self.prototypes, self.radius, scores, weight=score_weight)


def calibrated(scores: Tensor, empty_scores: Tensor | None, calibration: str) -> Tensor:
    """Scores (N, C) less what the model thinks without a text, ``empty_scores`` (C,).

    ``"official"`` divides logits by ``empty_scores / mean(empty_scores) + 1e-15``, as the authors' code does; where that is near 0 or
    negative, it changes order and sign. ``"logprob"`` subtracts log-probabilities over the classes. ``"none"`` leaves scores as they are.
    """
    if calibration == "none":
        return scores
    if calibration == "logprob":
        return scores.log_softmax(1) - empty_scores.log_softmax(0)
    return scores / (empty_scores / empty_scores.mean() + 1e-15)


def train(
    features: Tensor, labels: Tensor, scores: Tensor | None, classes: int, *, dim: int, lr: float, epochs: int, score_weight: float, seed: int
) -> tuple[Head, Tensor]:
    """Adam on all of ``features`` (N, H) and ``labels`` (N,) in every epoch: the head and the loss before each step, (epochs,).

    The gradient needs two matrix products and one pass over what was projected, so no autograd. The projection is kept transposed,
    as (H, D): with few texts the first product is then twice as fast.
    """
    generator = torch.Generator().manual_seed(seed)
    width, device = features.shape[1], features.device

    def uniform(bound, *size):
        return torch.empty(size).uniform_(-bound, bound, generator=generator).to(device)

    projection = uniform(width**-0.5, dim, width).T.contiguous()  # [H, D], as nn.Linear starts
    prototypes = uniform((6 / (classes + dim)) ** 0.5, classes, dim)  # Xavier
    projected = features @ projection  # [N, D]
    radius = torch.stack([_spread(projected[labels == k]) for k in range(classes)])
    grad_projection, losses = torch.empty_like(projection), []
    optimizer = Adam([projection, radius], lr)
    objective = prototype_objective(prototypes, scores, labels, weight=score_weight)
    for _ in range(epochs):
        torch.mm(features, projection, out=projected)
        loss, grad, grad_radius = objective(projected, radius)
        torch.mm(features.T, grad, out=grad_projection)
        optimizer.step([grad_projection, grad_radius])
        losses.append(loss)
    return Head(projection.T.contiguous(), prototypes, radius), torch.stack(losses) if losses else radius.new_empty(0)


def _spread(projected: Tensor) -> Tensor:
    """The mean distance of a class's texts (n, D) to their mean: 0 of one text."""
    return (projected - projected.mean(0)).norm(dim=1).mean()
