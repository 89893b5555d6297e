"""The cost of the logits of label words."""

from math import prod

from torch import Tensor

from ..cost import Cost, gradient_bytes, nbytes


def label_logits(
    hidden: Tensor,
    weight: Tensor,
    label_ids: Tensor,
    *,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    backward: bool = False,
) -> Cost:
    """The cost of a row of ``hidden`` per text, a row of ``weight`` per word, and their matmul.

    Backward has a matmul for each of ``hidden`` and ``weight`` that requires a gradient. Gradients are dense: they have
    the full size of their tensors.
    """
    batch, width = hidden.shape[0], hidden.shape[-1]
    words = int((label_ids >= 0).sum())
    out = batch * label_ids.shape[0] * max(4, hidden.element_size())
    rows = (batch + words) * width * hidden.element_size()
    biases = 0 if bias is None else words * bias.element_size()
    cost = Cost(rows + biases + nbytes(label_ids, positions) + out, 2 * batch * words * width)
    if not backward:
        return cost
    products = 1 + hidden.requires_grad + weight.requires_grad
    return Cost(cost.bytes + out + gradient_bytes(hidden, weight, bias), products * cost.operations)


def _forward_flops(hidden, weight, label_ids, *args, out_shape=None) -> int:
    return 2 * hidden[0] * prod(label_ids) * weight[1]


def _backward_flops(grad_words, weight, label_ids, impl, out_shape=None) -> int:
    return 2 * grad_words[0] * prod(label_ids) * weight[1]


FLOPS = {"label_logits": _forward_flops, "label_logits_backward": _backward_flops}
