"""Cross-attention of a few label slots over frozen features, without keys and values where that is cheaper."""

import os

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..implementations import Implementations, no_second_derivative
from . import absorbed

__all__ = ["label_cross_attention"]

# Implementations have one of two interfaces. With keys and values: forward(query, features, w_k, w_v, lengths, offsets,
# heads, keep) -> out, saved; and backward(grad, query, features, w_k, w_v, saved, lengths, offsets, heads) -> gradients
# of query, w_k, w_v. Absorbed, where absorbed.py multiplies by the weights: pool(queries, features, lengths, offsets,
# scale, keep) -> pooled (H, B, S, d) in the queries' dtype, weights (B, n, H * S) or (total, H * S) float32, 0 in the
# padding, None without keep; and pool_backward(grad_pooled, features, weights, lengths, offsets, scale, shared) ->
# gradient of the queries (H, B, S, d) float32, with shared its sum over B, (H, 1, S, d). queries: (H, B or 1, S, d),
# contiguous, as are pooled and its gradient. No implementation may read the padding.
implementations = Implementations(__name__, "reference", "explicit", "matmul", "cpp", "triton")
ABSORBED = ("matmul", "cpp", "triton")

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "label_cross_attention(Tensor query, Tensor features, Tensor w_k, Tensor w_v, Tensor? lengths, Tensor? offsets, int"
    " num_heads, bool keep, str impl) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "label_cross_attention_backward(Tensor grad, Tensor query, Tensor features, Tensor w_k, Tensor w_v, Tensor weights,"
    " Tensor saved, Tensor? lengths, Tensor? offsets, int num_heads, bool need_query, bool need_key, bool need_value,"
    " str impl) -> (Tensor, Tensor, Tensor)"
)


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
    impl: str = "auto",
) -> Tensor:
    """Multi-head attention of S slots over the features of every row, without an output projection.

    Y-Tuning, arXiv 2202.09817. With few slots it is cheaper to apply the weights on the side of the slots (the absorbed
    form): ``(W_q s)_h . (W_k f)_h = (W_k,h^T (W_q s)_h) . f``, and ``sum_i p_i (W_v f_i)_h = W_v,h sum_i p_i f_i``.
    Then every matmul over the tokens has S * num_heads columns instead of d.

    Args:
        slots: (S, d), the same for every row, or (B, S, d); float32 or in ``features``'s dtype.
        features: (B, n, d), or with ``offsets`` (total, d); float32, float16, bfloat16 or float64. They are constants.
        w_q: (d, d) as in ``nn.Linear`` without bias, in ``slots``'s dtype.
        w_k: (d, d), as ``w_q``. A bias of the keys would not change the result.
        w_v: (d, d), as ``w_q``.
        lengths: (B,) int32 or int64 in [0, n]: the number of features in each row; padding after them is never read.
            None: n.
        offsets: (B + 1,) int32 or int64, from 0 to total: row b has the features ``offsets[b]:offsets[b + 1]``. Not
            with ``lengths``.
        num_heads: number of heads; must divide d.
        impl: ``"auto"``, or ``"reference"``, ``"explicit"`` (keys and values by the library), ``"matmul"`` (absorbed,
            by the library), ``"cpp"`` or ``"triton"``.

    Returns:
        (B, S, d) in ``slots``'s dtype; 0 if a row has no features.

    The absorbed form saves the attention weights, in float32, and the pooled features for backward; ``"explicit"``
    saves keys and values. Gradients go to ``slots`` and the weights.

    Values of ``lengths`` and ``offsets`` are checked on the CPU. On a GPU the check would synchronize with the device,
    so it runs only if the environment variable ``PEFT_KERNELS_DEBUG`` is 1.

    Raises:
        ValueError: invalid shapes, devices or values, features that require a gradient, or a named implementation that
            cannot run here.
        TypeError: invalid dtypes.
    """
    name = "label_cross_attention"
    implementations.check(name, impl)
    _check(name, slots, features, {"w_q": w_q, "w_k": w_k, "w_v": w_v}, lengths, offsets, num_heads)
    query = linear(slots, w_q).to(slots.dtype)  # to: autocast
    query = query if slots.ndim == 3 else query[None]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (query, w_k, w_v))
    return torch.ops.peft_kernels.label_cross_attention.default(
        query, features, w_k, w_v, lengths, offsets, num_heads, keep, impl
    )[0]


def _check(name, slots, features, weights, lengths, offsets, num_heads):
    if lengths is not None and offsets is not None:
        raise ValueError(f"{name}: lengths and offsets exclude each other, got both")
    if features.ndim != (3 if offsets is None else 2):
        raise ValueError(f"{name}: features must be (B, n, d), with offsets (total, d), got {tuple(features.shape)}")
    if features.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"{name}: features must be float32, float16, bfloat16 or float64, got {features.dtype}")
    if features.requires_grad:
        raise ValueError(f"{name}: features must not require a gradient: they are constants, detach them")
    width = features.shape[-1]
    for argument, x in (("lengths", lengths), ("offsets", offsets)):
        if x is None:
            continue
        fits = x.ndim == 1 and (x.shape[0] == features.shape[0] if argument == "lengths" else x.shape[0] > 0)
        if not fits:
            expected = f"({features.shape[0]},)" if argument == "lengths" else "(B + 1,)"
            raise ValueError(f"{name}: {argument} must be {expected}, got {tuple(x.shape)}")
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: {argument} must be int32 or int64, got {x.dtype}")
    batch = features.shape[0] if offsets is None else offsets.shape[0] - 1
    if slots.ndim not in (2, 3) or slots.shape[-1] != width or (slots.ndim == 3 and slots.shape[0] != batch):
        raise ValueError(f"{name}: slots must be (S, {width}) or ({batch}, S, {width}), got {tuple(slots.shape)}")
    if slots.dtype not in (features.dtype, torch.float32) or (
        features.dtype == torch.float64 and slots.dtype != torch.float64
    ):
        raise TypeError(
            f"{name}: slots must be {features.dtype} as features are, or float32 (not under float64), got {slots.dtype}"
        )
    for argument, x in weights.items():
        if x.shape != (width, width):
            raise ValueError(f"{name}: {argument} must be ({width}, {width}), got {tuple(x.shape)}")
        if x.dtype != slots.dtype:
            raise TypeError(f"{name}: {argument} must be {slots.dtype} as slots are, got {x.dtype}")
    if not isinstance(num_heads, int) or num_heads < 1 or width % num_heads:
        raise ValueError(f"{name}: num_heads must divide d = {width}, got {num_heads!r}")
    for argument, x in {"slots": slots, **weights, "lengths": lengths, "offsets": offsets}.items():
        if x is not None and x.device != features.device:
            raise ValueError(f"{name}: {argument} must be on {features.device} as features are, got {x.device}")


def choose(device: str, features: torch.dtype, queries: int, width: int) -> str:
    """Returns the implementation behind ``impl="auto"``, forward and backward: the first row that applies.

    ``queries`` is S * num_heads.

    | case                          | implementation |
    | ----------------------------- | -------------- |
    | float64                       | reference      |
    | as many queries as d, or more | explicit       |
    | CPU, native library built     | cpp            |
    | CUDA or ROCm, triton          | triton         |
    | anything else                 | matmul         |
    """
    if features == torch.float64:
        return "reference"
    if queries >= width:
        return "explicit"
    for impl in ("cpp", "triton"):
        if implementations.unavailable(impl, device, features) is None and (impl != "triton" or device != "cpu"):
            return impl
    return "matmul"


def _resolve(impl, query, features, num_heads):
    device, dtype = features.device.type, features.dtype
    if impl == "auto":
        impl = choose(device, dtype, query.shape[1] * num_heads, query.shape[2])
    return impl, implementations.runnable("label_cross_attention", impl, device, dtype)


def _check_values(features, lengths, offsets):
    name, values = "label_cross_attention", lengths if offsets is None else offsets
    if values is None or (values.device.type != "cpu" and os.environ.get("PEFT_KERNELS_DEBUG") != "1"):
        return
    if offsets is not None:
        total = features.shape[0]
        if offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 0).any():
            raise ValueError(f"{name}: offsets must go from 0 to {total} and not decrease, got {offsets.tolist()}")
    elif lengths.numel():
        low, high = (int(v) for v in lengths.aminmax())
        if low < 0 or high > features.shape[1]:
            raise ValueError(f"{name}: lengths must lie in [0, {features.shape[1]}], got values from {low} to {high}")


@torch.library.impl(_lib, "label_cross_attention", "CompositeExplicitAutograd")
def _forward(query, features, w_k, w_v, lengths, offsets, num_heads, keep, impl):
    """Returns the result, the attention weights, and the form's other saved tensor; the last two may be empty."""
    _check_values(features, lengths, offsets)
    impl, implementation = _resolve(impl, query, features, num_heads)
    arguments = query, features, w_k, w_v, lengths, offsets, num_heads, keep
    with torch.autocast(features.device.type, enabled=False):
        if impl in ABSORBED:
            out, weights, saved = absorbed.forward(implementation.pool, *arguments)
        else:
            weights, (out, saved) = None, implementation.forward(*arguments)
    return (
        out,
        query.new_empty(0, dtype=torch.float32) if weights is None else weights,
        query.new_empty(0) if saved is None else saved,
    )


@torch.library.impl(_lib, "label_cross_attention_backward", "CompositeExplicitAutograd")
def _backward(
    grad, query, features, w_k, w_v, weights, saved, lengths, offsets, num_heads, need_query, need_key, need_value, impl
):
    impl, implementation = _resolve(impl, query, features, num_heads)
    needs = need_query, need_key, need_value
    if impl in ABSORBED:
        backward = implementation.pool_backward
        grads = absorbed.backward(
            backward, grad, query, features, w_k, w_v, weights, saved, lengths, offsets, num_heads, *needs
        )
    else:
        grads = implementation.backward(grad, query, features, w_k, w_v, saved, lengths, offsets, num_heads)
    return tuple(g.contiguous() if needed else query.new_empty(0) for g, needed in zip(grads, needs))


@torch.library.register_fake("peft_kernels::label_cross_attention", lib=_lib)
def _(query, features, w_k, w_v, lengths, offsets, num_heads, keep, impl):
    impl, _ = _resolve(impl, query, features, num_heads)
    batch = features.shape[0] if offsets is None else offsets.shape[0] - 1
    _, slots, width = query.shape
    out = query.new_empty(batch, slots, width)
    weights, saved = query.new_empty(0, dtype=torch.float32), query.new_empty(0)
    if keep and impl in ABSORBED:
        weights = query.new_empty(*features.shape[:-1], num_heads * slots, dtype=torch.float32)
        saved = query.new_empty(num_heads, batch, slots, width)
    elif keep and impl == "explicit":
        saved = query.new_empty(*features.shape[:-1], 2 * width)
    return out, weights, saved


@torch.library.register_fake("peft_kernels::label_cross_attention_backward", lib=_lib)
def _(
    grad, query, features, w_k, w_v, weights, saved, lengths, offsets, num_heads, need_query, need_key, need_value, impl
):
    pairs = (query, need_query), (w_k, need_key), (w_v, need_value)
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in pairs)


def _setup_context(ctx, inputs, output):
    query, features, w_k, w_v, lengths, offsets, ctx.num_heads, _, ctx.impl = inputs
    _, weights, saved = output
    ctx.mark_non_differentiable(weights, saved)
    ctx.set_materialize_grads(False)  # no zeros as gradients of weights and saved
    ctx.save_for_backward(query, features, w_k, w_v, weights, saved, lengths, offsets)


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    query, features, w_k, w_v, weights, saved, lengths, offsets = ctx.saved_tensors
    need_query, _, need_key, need_value, *_ = ctx.needs_input_grad
    needs = need_query, need_key, need_value
    grads = torch.ops.peft_kernels.label_cross_attention_backward.default(
        grad, query, features, w_k, w_v, weights, saved, lengths, offsets, ctx.num_heads, *needs, ctx.impl
    )
    grad_query, grad_key, grad_value = (g if needed else None for g, needed in zip(grads, needs))
    return grad_query, None, grad_key, grad_value, *(None,) * 5


torch.library.register_autograd(
    "peft_kernels::label_cross_attention", _autograd, setup_context=_setup_context, lib=_lib
)
no_second_derivative(_lib, "label_cross_attention_backward")
