"""The costs of add, norm and injection in one pass."""

from torch import Tensor

from ..cost import Cost, gradient_bytes, nbytes

FORWARD_OPERATIONS = 8  # per element: the sum, mean and variance, scaling, weight and bias
BACKWARD_OPERATIONS = 11  # per element: the two means over a row and their subtraction, recomputed from the sum


def add_layer_norm_inject(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    vectors: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    adapter_ids: Tensor | None = None,
    backward: bool = False,
) -> Cost:
    """The cost of reading ``x`` and ``residual`` and writing the result.

    Backward reads the result's gradient and writes one gradient for both ``x`` and ``residual``.
    """
    return _cost(x, residual, (weight, bias, vectors), (slots, adapter_ids), 1, backward)


def add_inject_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    vectors: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    adapter_ids: Tensor | None = None,
    backward: bool = False,
) -> Cost:
    """The cost of ``add_layer_norm_inject`` with two results, the norm and the sum, and a gradient of each."""
    return _cost(x, residual, (weight, bias, vectors), (slots, adapter_ids), 2, backward)


def _cost(x, residual, parameters, indices, results, backward):
    cost = Cost(nbytes(x, residual, *parameters, *indices) + results * x.nbytes, FORWARD_OPERATIONS * x.numel())
    if not backward:
        return cost
    grad_x = x.nbytes if x.requires_grad or residual.requires_grad else 0
    moved = cost.bytes + results * x.nbytes + grad_x + gradient_bytes(*parameters)
    return Cost(moved, cost.operations + BACKWARD_OPERATIONS * x.numel())
