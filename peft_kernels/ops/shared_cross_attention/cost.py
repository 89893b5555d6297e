"""The cost of shared cross-attention."""

from torch import Tensor

from ..cost import Cost, gradient_bytes, nbytes


def shared_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    encoder_index: Tensor | None = None,
    backward: bool = False,
) -> Cost:
    """Two matmuls of every query row with the keys of its input; backward, one for each of dP, dQ, dK and dV.

    Keys past an input's length are not read. Their gradients are written as 0.
    """
    streams, heads, tokens, width = query.shape
    inputs, _, n, _ = key.shape
    lengths = [n] * inputs if key_lengths is None else key_lengths.tolist()
    index = [u * inputs // streams for u in range(streams)] if encoder_index is None else encoder_index.tolist()
    product = 2 * sum(lengths[e] for e in index) * tokens * heads * width
    moved = (
        2 * query.nbytes + 2 * sum(lengths) * heads * width * key.element_size() + nbytes(key_lengths, encoder_index)
    )
    if not backward:
        return Cost(moved, 2 * product)
    needs_query, needs_key, needs_value = (x.requires_grad for x in (query, key, value))
    products = (needs_query or needs_key) + needs_query + needs_key + needs_value
    return Cost(moved + query.nbytes + gradient_bytes(query, key, value), (2 + products) * product)


def _forward_flops(query, key, value, *args, out_shape=None) -> int:
    return 2 * _matmul_flops(query, key)


def _backward_flops(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    out,
    lse,
    key_lengths,
    encoder_index,
    cu_streams,
    scale,
    *needs,
    out_shape=None,
) -> int:
    """Returns the operations of the recomputed scores, dP, and one matmul per needed gradient."""
    need_query, need_key, need_value, _ = needs
    return (1 + (need_query or need_key) + need_query + need_key + need_value) * _matmul_flops(query, key)


def _matmul_flops(query, key):
    streams, heads, tokens, width = query
    return 2 * streams * heads * tokens * key[2] * width


FLOPS = {"shared_cross_attention": _forward_flops, "shared_cross_attention_backward": _backward_flops}
