"""Benchmarks of the fused add, norm and injection between two layers, against separate operations.

weight and bias are frozen; x, residual and vectors take gradients.
"""

import torch
from torch.nn.functional import layer_norm

from ... import ops
from ..problem import Candidate, Operator, Problem, RandomInputs, compiled, plain
from ..special_tokens.problems import one_hot_of, special_positions

EPS = 1e-12


def post_norm(weight, bias, one_hot):
    return lambda x, residual, vectors: layer_norm(x + residual, weight.shape, weight, bias, EPS) + one_hot @ vectors


def pre_norm(weight, bias, one_hot):
    def inject(x, residual, vectors):
        total = x + residual + one_hot @ vectors
        return layer_norm(total, weight.shape, weight, bias, EPS), total

    return inject


def operator(name, separate, results, title, about):
    """Returns the benchmark of one of the two forms."""

    def problem(shape, variant, dtype, device, backward) -> Problem:
        batch, length, width, count = (shape[letter] for letter in "BSdk")
        random = RandomInputs(device, dtype)
        slots = special_positions(random, batch, length, count)
        x, residual, *grads = (random.normal(batch, length, width) for _ in range(2 + results))
        weight, bias, vectors = 1 + random.normal(width) / 8, random.normal(width), random.normal(count, width)

        def ours(impl):
            return Candidate(
                lambda x, residual, vectors: getattr(ops, name)(
                    x, residual, weight, bias, vectors, slots, eps=EPS, impl=impl
                )
            )

        def cost(x, residual, vectors, backward):
            from . import cost

            return getattr(cost, name)(x, residual, weight, bias, vectors, slots, backward=backward)

        def roofline():
            """Reads the same tensors and writes new ones: a CPU pays for their page faults."""
            torch.add(x, residual)
            for grad in grads[1:] + (grads if backward else []):
                grad.clone()

        candidate = separate(weight, bias, one_hot_of(slots, x))
        return Problem(
            leaves=(x, residual, vectors),
            grads=tuple(grads),
            ours=ours,
            truth=separate(weight.double(), bias.double(), one_hot_of(slots, x.double())),
            cost=cost,
            baselines={"separate operations": plain(candidate), "separate operations, compiled": compiled(candidate)},
            roofline=roofline if device == "cpu" else None,
        )

    return Operator(
        name=name,
        title=title,
        about=about,
        published="separate operations",
        shapes=tuple(dict(zip("BSdk", size)) for size in ((32, 128, 768, 2), (32, 128, 1024, 2))),
        quick_shapes=({"B": 16, "S": 128, "d": 512, "k": 2},),
        problem=problem,
    )


OPERATORS = {
    "add_layer_norm_inject": operator(
        "add_layer_norm_inject",
        post_norm,
        results=1,
        title="Addition, layer norm and injection",
        about="PASTA in a post-norm layer: residual, norm and the vectors of the next layer in one pass, for B rows of"
        " S tokens of width d with k vectors.",
    ),
    "add_inject_layer_norm": operator(
        "add_inject_layer_norm",
        pre_norm,
        results=2,
        title="Addition, injection and layer norm",
        about="PASTA in a pre-norm layer: the same for models whose norm comes after the vectors.",
    ),
}
