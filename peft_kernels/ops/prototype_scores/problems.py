"""Benchmarks of prototype scores, their loss, and the loss with gradients for a loop without autograd.

Features are frozen.
"""

import torch
from torch.nn.functional import cross_entropy, normalize

from ... import ops
from ..problem import Candidate, Operator, Problem, RandomInputs, compiled, plain

WEIGHT = 1 / 16


def scores_of(projected, prototypes, radius, scores):
    """The formula as written, (N, C)."""
    return radius - (normalize(projected, dim=1)[:, None] - prototypes).norm(dim=2) + WEIGHT * scores


def random_inputs(shape, device):
    """Draws features (N, H), projection (D, H), prototypes (C, D), radius (C,), scores (N, C) and labels (N,).

    Also returns the source of random numbers, for more draws.
    """
    count, width, dim, classes = (shape[letter] for letter in "NHDC")
    random = RandomInputs(device, torch.float32)
    features, projection = random.normal(count, width), random.normal(dim, width) / width**0.5
    prototypes, radius, scores = random.normal(classes, dim), random.normal(classes), random.normal(count, classes)
    return features, projection, prototypes, radius, scores, random.integers(0, classes, count), random


def scoring(shape, variant, dtype, device, backward) -> Problem:
    features, projection, prototypes, radius, scores, _, random = random_inputs(shape, device)

    def ours(impl):
        return Candidate(lambda *leaves: ops.prototype_scores(features, *leaves, scores, weight=WEIGHT, impl=impl))

    def cost(*leaves, backward):
        from . import cost

        return cost.prototype_scores(features, *leaves, scores, backward=backward)

    def formula(features, scores):
        return lambda projection, prototypes, radius: scores_of(features @ projection.mT, prototypes, radius, scores)

    return Problem(
        leaves=(projection, prototypes, radius),
        grads=(random.normal(*scores.shape),),
        ours=ours,
        truth=formula(features.double(), scores.double()),
        cost=cost,
        baselines=in_pytorch(formula(features, scores)),
    )


def loss(shape, variant, dtype, device, backward) -> Problem:
    features, projection, prototypes, radius, scores, labels, _ = random_inputs(shape, device)

    def ours(impl):
        return Candidate(
            lambda projection, radius: ops.prototype_cross_entropy(
                features, projection, prototypes, radius, scores, labels, weight=WEIGHT, impl=impl
            )
        )

    def cost(projection, radius, backward):
        from . import cost

        return cost.prototype_cross_entropy(features, projection, prototypes, radius, scores, labels, backward=backward)

    def formula(features, prototypes, scores):
        return lambda projection, radius: cross_entropy(
            scores_of(features @ projection.mT, prototypes, radius, scores), labels
        )

    return Problem(
        leaves=(projection, radius),
        grads=(torch.ones((), device=device),),
        ours=ours,
        truth=formula(*(x.double() for x in (features, prototypes, scores))),
        cost=cost,
        baselines=in_pytorch(formula(features, prototypes, scores)),
    )


def objective(shape, variant, dtype, device, backward) -> Problem:
    """The problem of the objective. The gradients are part of the result, so there is only a forward."""
    features, projection, prototypes, radius, scores, labels, _ = random_inputs(shape, device)
    projected = features @ projection.mT

    def ours(impl):
        function = ops.prototype_objective(prototypes, scores, labels, weight=WEIGHT, impl=impl)
        return Candidate(lambda: function(projected, radius))

    def cost(backward):
        from . import cost

        return cost.prototype_objective(projected, radius, prototypes, scores, labels, backward=backward)

    def formula(projected, radius, prototypes, scores):
        leaves = projected.requires_grad_(), radius.requires_grad_()

        @torch.enable_grad()
        def loss_and_gradients():
            result = cross_entropy(scores_of(leaves[0], prototypes, leaves[1], scores), labels)
            return result, *torch.autograd.grad(result, leaves)

        return loss_and_gradients

    tensors = projected, radius, prototypes, scores
    return Problem(
        leaves=(),
        grads=(),
        ours=ours,
        truth=formula(*(x.double() for x in tensors)),
        cost=cost,
        baselines={"formula, autograd": plain(formula(projected.clone(), radius.clone(), prototypes, scores))},
    )


def in_pytorch(formula):
    return {"formula": plain(formula), "formula, compiled": compiled(formula)}


def operator(name, problem, **rest):
    shapes = [dict(zip("NHDC", size)) for size in ((32, 1024, 128, 2), (224, 1024, 128, 14), (64, 512, 128, 4))]
    return Operator(
        name=name,
        shapes=tuple(shapes[:2]),
        quick_shapes=tuple(shapes[2:]),
        dtypes=("float32",),
        problem=problem,
        **rest,
    )


OPERATORS = {
    "prototype_scores": operator(
        "prototype_scores",
        scoring,
        title="Prototype scores",
        about="DecT: N features of width H projected to width D, their distances to C prototypes, and the model's own"
        " scores.",
    ),
    "prototype_cross_entropy": operator(
        "prototype_cross_entropy",
        loss,
        title="Prototype cross-entropy",
        about="DecT: the loss of prototype scores.",
    ),
    "prototype_objective": operator(
        "prototype_objective",
        objective,
        title="Prototype objective",
        about="DecT: loss and gradients of prototype scores in one call.",
        has_backward=False,
    ),
}
