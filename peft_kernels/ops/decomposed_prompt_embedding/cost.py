"""The cost of the decomposed prompt embedding."""

from math import prod

from torch import Tensor

from ..cost import Cost, gradient_bytes, nbytes


def decomposed_prompt_embedding(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    delta: Tensor | None = None,
    offsets: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    backward: bool = False,
) -> Cost:
    """The cost of a table row per token, the parameters, the output, ``a @ b`` per adapter and an addition per element.

    Backward sums the output's gradient over the batch and multiplies it by ``a`` and by ``b``. A repeated token is read
    again each time. A table that requires a gradient gets a dense one.
    """
    batch, length = input_ids.shape
    width, item = weight.shape[1], weight.element_size()
    parameters = [x for x in (prompt, a, b, delta) if x is not None]
    out = batch * (prompt.shape[-2] + length) * width * item
    tokens = batch * length * width
    product = 0 if a is None else 2 * a.numel() * width
    moved = nbytes(input_ids, offsets, adapter_ids, *parameters) + tokens * item + out
    if not backward:
        return Cost(moved, product + tokens)
    products = 0 if a is None else a.requires_grad + b.requires_grad
    return Cost(moved + out + gradient_bytes(weight, *parameters), (1 + products) * product + 2 * tokens)


def _forward_flops(input_ids, weight, prompt, a, b, *args, out_shape=None) -> int:
    return 0 if a is None else 2 * prod(a) * b[-1]


def _backward_flops(grad, adapters, virtual, positions, a, b, *args, out_shape=None) -> int:
    """Returns the operations of the gradients of a and b."""
    return 0 if a is None else 4 * prod(a) * b[-1]


FLOPS = {"decomposed_prompt_embedding": _forward_flops, "decomposed_prompt_embedding_backward": _backward_flops}
