"""The costs of prototype scores and their loss."""

from torch import Tensor

from ..cost import Cost, gradient_bytes, nbytes

DISTANCE_OPERATIONS = 3  # per element: difference, square, sum
PULL_OPERATIONS = 3  # per element of the gradient: difference, factor, sum


def prototype_scores(
    features: Tensor,
    projection: Tensor,
    prototypes: Tensor,
    radius: Tensor,
    scores: Tensor | None = None,
    *,
    backward: bool = False,
) -> Cost:
    """The cost of a matmul with the projection and of (N, C) distances.

    Backward has a matmul for each of ``features`` and ``projection`` that requires a gradient.
    """
    out = features.shape[0] * prototypes.shape[0] * features.element_size()
    return _cost(features, projection, prototypes, radius, (scores,), out, backward)


def prototype_cross_entropy(
    features: Tensor,
    projection: Tensor,
    prototypes: Tensor,
    radius: Tensor,
    scores: Tensor | None,
    labels: Tensor,
    *,
    backward: bool = False,
) -> Cost:
    """The cost of ``prototype_scores`` with a scalar result."""
    return _cost(features, projection, prototypes, radius, (scores, labels), features.element_size(), backward)


def prototype_objective(
    projected: Tensor,
    radius: Tensor,
    prototypes: Tensor,
    scores: Tensor | None,
    labels: Tensor,
    *,
    backward: bool = False,
) -> Cost:
    """The cost of one call of the returned function: loss and both gradients, from projected features."""
    distances = projected.numel() * prototypes.shape[0]
    moved = nbytes(projected, radius, prototypes, scores, labels) + projected.element_size() + nbytes(projected, radius)
    return Cost(moved, (DISTANCE_OPERATIONS + PULL_OPERATIONS) * distances)


def _cost(features, projection, prototypes, radius, other_inputs, out, backward):
    count, width = features.shape
    product = 2 * count * width * projection.shape[0]
    distances = count * prototypes.numel()
    trained = features, projection, prototypes, radius
    cost = Cost(nbytes(*trained, *other_inputs) + out, product + DISTANCE_OPERATIONS * distances)
    if not backward:
        return cost
    products = features.requires_grad + projection.requires_grad
    pulls = PULL_OPERATIONS * distances if products or prototypes.requires_grad else 0
    return Cost(cost.bytes + out + gradient_bytes(*trained), cost.operations + products * product + pulls)
