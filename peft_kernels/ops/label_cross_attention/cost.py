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
    """The cost of the cheaper form: keys and values of every feature, or weights applied to the slots (absorbed).

    Features past a row's length are not read. Features take no gradient; slots and weights do if they require one.
    """
    width, item = features.shape[-1], features.element_size()
    batch = features.shape[0] if offsets is None else len(offsets) - 1
    tokens = features.numel() // width if lengths is None else int(lengths.sum())
    slots_per_row = slots.shape[-2]
    rows = batch * slots_per_row if slots.ndim == 3 else slots_per_row  # rows of the query projection
    weights = w_q, w_k, w_v
    moved = tokens * width * item + nbytes(slots, *weights, lengths, offsets)
    out = batch * slots_per_row * width * slots.element_size()
    need_slots, need_w_q, need_key, need_value = (x.requires_grad for x in (slots, *weights))
    needs = (need_slots or need_w_q, need_key, need_value, need_slots, need_w_q) if backward else None
    sizes = tokens, rows, batch, slots_per_row, width, num_heads
    operations = min(form(*sizes, needs) for form in (_explicit, _absorbed))
    return Cost(moved + out + (out + gradient_bytes(slots, *weights) if backward else 0), operations)


def _explicit(tokens, rows, batch, slots_per_row, width, heads, needs):
    project_slots = 2 * rows * width**2  # one matmul of a weight with the slots
    project_tokens = 2 * tokens * width**2
    attend = 2 * tokens * slots_per_row * width
    forward = project_slots + 2 * project_tokens + 2 * attend
    if needs is None:
        return forward
    query, key, value, slots, w_q = needs
    attention = ((query or key) + query + key + value) * attend
    return forward + (slots + w_q) * project_slots + (key + value) * project_tokens + attention


def _absorbed(tokens, rows, batch, slots_per_row, width, heads, needs):
    project_queries = 2 * rows * width**2
    project_pooled = 2 * batch * slots_per_row * width**2
    attend = 2 * tokens * slots_per_row * heads * width
    forward = 2 * project_queries + project_pooled + 2 * attend
    if needs is None:
        return forward
    query, key, value, slots, w_q = needs
    # gradients of the pooled features, the scores and the queries
    scores = 2 * attend + project_pooled if query or key else 0
    return forward + (slots + w_q + query + key) * project_queries + value * project_pooled + scores


def _forward_flops(query, features, w_k, w_v, lengths, offsets, num_heads, *args, out_shape=None) -> int:
    project_slots = 2 * query[0] * query[1] * query[2] ** 2  # the matmul with w_q runs outside of the operator
    sizes = _sizes(query, features, offsets, num_heads)
    return min(form(*sizes, None) for form in (_explicit, _absorbed)) - project_slots


def _backward_flops(
    grad, query, features, w_k, w_v, weights, saved, lengths, offsets, num_heads, *needs, out_shape=None
) -> int:
    sizes = _sizes(query, features, offsets, num_heads)
    form = min((_explicit, _absorbed), key=lambda form: form(*sizes, None))
    return form(*sizes, (*needs[:3], False, False)) - form(*sizes, None)


def _sizes(query, features, offsets, heads):
    batch = features[0] if offsets is None else offsets[0] - 1
    return prod(features[:-1]), query[0] * query[1], batch, query[1], query[2], heads


FLOPS = {"label_cross_attention": _forward_flops, "label_cross_attention_backward": _backward_flops}
