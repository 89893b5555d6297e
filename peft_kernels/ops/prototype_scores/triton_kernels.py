"""Triton kernels: a program keeps whole projected rows in registers and loops over the classes. Everything is float32.

Gradients follow the formulas of reference.py and recompute the distances. Prefixes: o_ offsets, m_ masks, b_ blocks in
registers. Roots, and divisions by lengths and distances, round to nearest, because cancellation between rows and
prototypes exposes every bit.
"""

import triton
import triton.language as tl

SHORTEST = tl.constexpr(1e-12)  # of reference.py


@triton.jit
def load_normal(projected, o_i, m_i, o_d, d):
    """Returns rows of length 1, [BR, BD], and 1 / length, [BR]; both are 0 for a row of length 0."""
    m = m_i[:, None] & (o_d < d)[None, :]
    b_x = tl.load(projected + o_i.to(tl.int64)[:, None] * d + o_d[None, :], mask=m, other=0.0)
    b_length = tl.sqrt_rn(tl.sum(b_x * b_x, 1))
    m_zero = b_length < SHORTEST
    b_length = tl.where(m_zero, 1.0, b_length)
    b_normal = tl.where(m_zero[:, None], 0.0, tl.div_rn(b_x, b_length[:, None]))
    return b_normal, tl.where(m_zero, 0.0, tl.div_rn(1.0, b_length))


@triton.jit
def away_from(prototype, b_normal, o_d, d):
    """Returns the differences between the rows and a prototype, [BR, BD], and their lengths, [BR]."""
    b_prototype = tl.load(prototype + o_d, mask=o_d < d, other=0.0)  # [BD]
    b_away = b_normal - b_prototype[None, :]
    return b_away, tl.sqrt_rn(tl.sum(b_away * b_away, 1))


@triton.jit
def score(radius, scores, weight, b_distance, o_i, m_i, k, classes):
    b_q = tl.load(radius + k) - b_distance  # [BR]
    if scores is not None:
        b_q += weight * tl.load(scores + o_i.to(tl.int64) * classes + k, mask=m_i, other=0.0)
    return b_q


@triton.jit
def pull(b_grad, b_distance):
    """Returns the gradient divided by the distance, [BR]; 0 for a distance of 0."""
    m_near = b_distance == 0
    return tl.where(m_near, 0.0, tl.div_rn(b_grad, tl.where(m_near, 1.0, b_distance)))


@triton.jit
def store_grad(grad_projected, b_grad, b_normal, b_inverse, o_i, m_i, o_d, d):
    """Stores the gradient of the projected rows; ``b_grad`` is the gradient of the normalised rows."""
    b_along = tl.sum(b_grad * b_normal, 1)
    b_grad = (b_grad - b_along[:, None] * b_normal) * b_inverse[:, None]
    tl.store(
        grad_projected + o_i.to(tl.int64)[:, None] * d + o_d[None, :], b_grad, mask=m_i[:, None] & (o_d < d)[None, :]
    )


@triton.jit(do_not_specialize=["texts", "classes"])
def prototype_scores_fwd_kernel(
    out, projected, prototypes, radius, scores, weight, texts, classes, d, BR: tl.constexpr, BD: tl.constexpr
):
    """Computes the scores of BR rows. Grid: blocks of rows."""
    o_i, o_d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    m_i = o_i < texts
    b_normal, b_inverse = load_normal(projected, o_i, m_i, o_d, d)
    prototype = prototypes
    for k in range(0, classes):
        b_away, b_distance = away_from(prototype, b_normal, o_d, d)
        prototype += d
        b_q = score(radius, scores, weight, b_distance, o_i, m_i, k, classes)
        tl.store(out + o_i.to(tl.int64) * classes + k, b_q, mask=m_i)


@triton.jit(do_not_specialize=["texts", "classes"])
def prototype_scores_bwd_kernel(
    grad_projected, grad, projected, prototypes, texts, classes, d, BR: tl.constexpr, BD: tl.constexpr
):
    """Computes the gradient of BR projected rows. Grid: blocks of rows."""
    o_i, o_d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    m_i = o_i < texts
    b_normal, b_inverse = load_normal(projected, o_i, m_i, o_d, d)
    b_grad_normal = tl.zeros([BR, BD], tl.float32)
    prototype = prototypes
    for k in range(0, classes):
        b_away, b_distance = away_from(prototype, b_normal, o_d, d)
        prototype += d
        b_grad = tl.load(grad + o_i.to(tl.int64) * classes + k, mask=m_i, other=0.0)  # [BR]
        b_grad_normal -= pull(b_grad, b_distance)[:, None] * b_away
    store_grad(grad_projected, b_grad_normal, b_normal, b_inverse, o_i, m_i, o_d, d)


@triton.jit(do_not_specialize=["texts", "rows", "classes"])
def prototype_scores_bwd_prototypes_kernel(
    partial, grad, projected, prototypes, texts, rows, classes, d, BR: tl.constexpr, BD: tl.constexpr
):
    """Sums the gradient of one prototype over ``rows`` texts, BR at a time and in order.

    Grid: classes, then parts of ``rows`` texts. ``partial`` is (parts, C, d).
    """
    k = tl.program_id(0) % classes
    begin = tl.program_id(0) // classes * rows
    end = tl.minimum(begin + rows, texts)
    o_d = tl.arange(0, BD)
    b_sum = tl.zeros([BR, BD], tl.float32)
    for start in range(begin, end, BR):
        o_i = start + tl.arange(0, BR)
        m_i = o_i < end
        b_normal, b_inverse = load_normal(projected, o_i, m_i, o_d, d)
        b_away, b_distance = away_from(prototypes + k.to(tl.int64) * d, b_normal, o_d, d)
        b_grad = tl.load(grad + o_i.to(tl.int64) * classes + k, mask=m_i, other=0.0)  # [BR]
        b_sum += pull(b_grad, b_distance)[:, None] * b_away
    tl.store(partial + tl.program_id(0).to(tl.int64) * d + o_d, tl.sum(b_sum, 0), mask=o_d < d)


@triton.jit(do_not_specialize=["texts", "classes"])
def prototype_cross_entropy_fwd_kernel(
    losses, grad_projected, partial, projected, prototypes, radius, scores, labels,
    weight, texts, classes, d,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Computes losses and gradients of BR rows. Grid: blocks of rows.

    ``losses`` is (N,); ``partial`` is (C, blocks), each block's contribution to the gradient of radius.
    """
    o_i, o_d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    m_i = o_i < texts
    b_label = tl.load(labels + o_i, mask=m_i, other=0)
    b_normal, b_inverse = load_normal(projected, o_i, m_i, o_d, d)

    b_max = tl.full([BR], float("-inf"), tl.float32)
    b_sum = tl.zeros([BR], tl.float32)
    b_own = tl.zeros([BR], tl.float32)
    prototype = prototypes
    for k in range(0, classes):
        b_away, b_distance = away_from(prototype, b_normal, o_d, d)
        prototype += d
        b_q = score(radius, scores, weight, b_distance, o_i, m_i, k, classes)
        b_new = tl.maximum(b_max, b_q)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # exp of a score of -inf is 0
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.exp(b_q - b_shift)
        b_max = b_new
        b_own = tl.where(b_label == k, b_q, b_own)
    tl.store(losses + o_i, tl.log(b_sum) + (b_max - b_own), mask=m_i)

    partial += tl.program_id(0)
    b_grad_normal = tl.zeros([BR, BD], tl.float32)
    prototype = prototypes
    for k in range(0, classes):
        b_away, b_distance = away_from(prototype, b_normal, o_d, d)
        prototype += d
        b_q = score(radius, scores, weight, b_distance, o_i, m_i, k, classes)
        b_grad = tl.exp(b_q - b_max) / b_sum - tl.where(b_label == k, 1.0, 0.0)
        b_grad = tl.where(m_i, b_grad / texts, 0.0)
        b_grad_normal -= pull(b_grad, b_distance)[:, None] * b_away
        # with this store above the line for b_grad_normal, Triton 3.6 spills registers on sm_90
        tl.store(partial, tl.sum(b_grad, 0))
        partial += tl.num_programs(0)
    store_grad(grad_projected, b_grad_normal, b_normal, b_inverse, o_i, m_i, o_d, d)
