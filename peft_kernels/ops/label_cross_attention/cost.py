"""The cost of label cross-attention."""

from math import prod

from torch import Tensor

from ..cost import Cost, gradient_bytes, nbytes


def label_cross_attention(
    slots: Tensor,
    features: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    num_heads: int,
    backward: bool = False,
) -> Cost:
    """The cheaper of two forms: keys and values of every feature, or weights applied on the side of the slots
    (absorbed).

    Features past a row's length are not read. Features take no gradient; slots and weights do if they require one.
    """
    width, item = features.shape[-1], features.element_size()
    batch = features.shape[0] if offsets is None else len(offsets) - 1
    tokens = features.numel() // width if lengths is None else int(lengths.sum())
    per_row = slots.shape[-2]
    rows = batch * per_row if slots.ndim == 3 else per_row  # rows of the query projection
    weights = w_q, w_k, w_v
    moved = tokens * width * item + nbytes(slots, *weights, lengths, offsets)
    out = batch * per_row * width * slots.element_size()
    needs = (
        slots.requires_grad or w_q.requires_grad,
        w_k.requires_grad,
        w_v.requires_grad,
        slots.requires_grad,
        w_q.requires_grad,
    )
    operations = min(
        form(tokens, rows, batch, per_row, width, num_heads, needs if backward else None)
        for form in (_explicit, _absorbed)
    )
    return Cost(moved + out + (out + gradient_bytes(slots, *weights) if backward else 0), operations)


def _explicit(tokens, rows, batch, per_row, width, heads, needs):
    small = 2 * rows * width**2  # one matmul of a weight with the slots
    large = 2 * tokens * width**2
    attend = 2 * tokens * per_row * width
    forward = small + 2 * large + 2 * attend
    if needs is None:
        return forward
    query, key, value, slots, w_q = needs
    return forward + (slots + w_q) * small + (key + value) * large + ((query or key) + query + key + value) * attend


def _absorbed(tokens, rows, batch, per_row, width, heads, needs):
    of_queries = 2 * rows * width**2
    of_pooled = 2 * batch * per_row * width**2
    attend = 2 * tokens * per_row * heads * width
    forward = 2 * of_queries + of_pooled + 2 * attend
    if needs is None:
        return forward
    query, key, value, slots, w_q = needs
    # gradients of the pooled features, the scores and the queries
    scores = 2 * attend + of_pooled if query or key else 0
    return forward + (slots + w_q + query + key) * of_queries + value * of_pooled + scores


def _forward_flops(query, features, w_k, w_v, lengths, offsets, num_heads, *args, out_shape=None) -> int:
    small = 2 * query[0] * query[1] * query[2] ** 2  # the matmul with w_q, which runs outside of the operator
    return min(form(*_sizes(query, features, offsets, num_heads), None) for form in (_explicit, _absorbed)) - small


def _backward_flops(
    grad, query, features, w_k, w_v, weights, kept, lengths, offsets, num_heads, *needs, out_shape=None
) -> int:
    sizes = _sizes(query, features, offsets, num_heads)
    form = min((_explicit, _absorbed), key=lambda form: form(*sizes, None))
    return form(*sizes, (*needs[:3], False, False)) - form(*sizes, None)


def _sizes(query, features, offsets, heads):
    batch = features[0] if offsets is None else offsets[0] - 1
    return prod(features[:-1]), query[0] * query[1], batch, query[1], query[2], heads


FLOPS = {"label_cross_attention": _forward_flops, "label_cross_attention_backward": _backward_flops}
