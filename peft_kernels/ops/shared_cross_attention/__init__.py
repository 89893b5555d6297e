"""Cross-attention in which many decoder streams share the keys and values of one encoder input."""

import os

import torch
from torch import Tensor

from ..implementations import Implementations, check_numbers, no_second_derivative
from .layout import token_major

__all__ = ["shared_cross_attention"]

# Each implementation has forward and backward.
implementations = Implementations(__name__, "reference", "sdpa", "matmul", "cpp", "triton")
MAX_HEAD_DIM = 256

# Without the native library, a CPU takes two matmuls on folded rows in these dtypes, while the scores of one head and
# input are at most this large, and PyTorch's flash attention otherwise (`peft-kernels bench shared_cross_attention`).
MATMUL_DTYPES = (torch.bfloat16,)
MATMUL_MAX_SCORE_BYTES = 8 << 20
AMX_ROWS = 64  # query rows per input from which the library's bfloat16 matmuls on AMX tiles beat our vector kernels

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "shared_cross_attention(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? encoder_index,"
    " float scale, bool need_lse, str impl) -> (Tensor, Tensor)"
)
_lib.define(
    "shared_cross_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor"
    " out, Tensor lse, Tensor? key_lengths, Tensor? encoder_index, float scale, bool need_query, bool need_key, bool"
    " need_value, str impl) -> (Tensor, Tensor, Tensor)"
)


def shared_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    encoder_index: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from N decoder streams to the keys and values of b encoder inputs, each stored once.

    The result is ``softmax(scale * query @ key[e].T) @ value[e]`` per head, where ``e`` is the input of the stream.
    Ordinary cross-attention gives the same on ``key.repeat_interleave(M, 0)``, with M copies in memory. Non-causal; no
    mask is built. Prompt-in-Decoder (PiD), arXiv 2403.13112, section 3.

    Args:
        query: (N, H, t, D), float32, float16, bfloat16 or float64, any strides. D at most 256.
        key: (b, H, n, D), same dtype and device, any strides.
        value: (b, H, n, D), as ``key``.
        key_lengths: (b,) int32 or int64 in [0, n]: input i has keys [0, key_lengths[i]); None: all n. Keys and values
            beyond them never affect a result, even if they are NaN. A row without keys gives output 0, log-sum-exp -inf
            and gradient 0.
        encoder_index: (N,) int32 or int64, non-decreasing, in [0, b): the input that each stream belongs to. None: N =
            b*M and stream u belongs to input u // M.
        scale: factor on the scores; ``D ** -0.5`` by default (T5: 1.0).
        return_lse: also return the natural log-sum-exp of the scaled scores; gradients flow through it.
        impl: ``"auto"``, or ``"reference"``, ``"sdpa"``, ``"matmul"``, ``"cpp"`` or ``"triton"``.

    Returns:
        (N, H, t, D) in ``query``'s dtype, laid out in memory as (N, t, H, D), so that ``out.transpose(1, 2)`` is
        contiguous. With ``return_lse``, also (N, H, t) in float32 (float64 for float64 inputs).

    Values of ``key_lengths`` and ``encoder_index`` are checked on the CPU. On a GPU the check would synchronize with
    the device, so it runs only if the environment variable ``PEFT_KERNELS_DEBUG`` is 1.

    Raises:
        ValueError: invalid shapes, devices or values, or a named implementation that cannot run here; the message says
            why.
        TypeError: invalid dtypes.
    """
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value, key_lengths, encoder_index)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    implementations.check("shared_cross_attention", impl)
    check_numbers("shared_cross_attention", scale=scale)
    need_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    need_lse = return_lse or need_grad
    out, lse = torch.ops.peft_kernels.shared_cross_attention.default(
        query, key, value, key_lengths, encoder_index, scale, need_lse, impl
    )
    return (out, lse) if return_lse else out


def choose(query: Tensor, key: Tensor) -> str:
    """Returns the implementation behind ``impl="auto"``, forward and backward: the first row that applies.

    | case                                           | implementation                             |
    | ---------------------------------------------- | ------------------------------------------ |
    | float64                                        | reference                                  |
    | CPU with AMX, bfloat16, AMX_ROWS rows or more  | sdpa                                       |
    | CPU, float32 or bfloat16, native library built | cpp                                        |
    | CPU                                            | matmul or sdpa, as the constants above say |
    | CUDA or ROCm, triton installed                 | triton                                     |
    | anything else                                  | reference                                  |
    """
    if query.dtype == torch.float64:
        return "reference"
    device = query.device.type
    if device == "cpu":
        if query.dtype == torch.bfloat16 and _rows(query, key) >= AMX_ROWS and torch.cpu._is_amx_tile_supported():
            return "sdpa"
        return "cpp" if implementations.unavailable("cpp", device, query.dtype) is None else _choose_library(query, key)
    return "triton" if implementations.unavailable("triton", device, query.dtype) is None else "reference"


def _choose_library(query, key):
    cached = _rows(query, key) * key.shape[2] * query.element_size() <= MATMUL_MAX_SCORE_BYTES
    return "matmul" if query.dtype in MATMUL_DTYPES and cached else "sdpa"


def _rows(query, key):
    """Returns the query rows per input; the mean if streams are ragged."""
    return query.shape[0] * query.shape[2] // max(key.shape[0], 1)


def _check(query, key, value, key_lengths, encoder_index):
    name = "shared_cross_attention"
    for argument, x in (("query", query), ("key", key), ("value", value)):
        if type(x) is not Tensor and hasattr(x, "placements"):
            raise TypeError(f"{name}: {argument} is a DTensor, which is not supported: pass its local tensor")
        if x.is_nested or x.ndim != 4:
            layout = "a nested tensor" if x.is_nested else tuple(x.shape)
            raise ValueError(f"{name}: {argument} must be a dense tensor of 4 dimensions, got {layout}")
    n_streams, heads, _, head_dim = query.shape
    inputs = key.shape[0]
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"{name}: query must be float32, float16, bfloat16 or float64, got {query.dtype}")
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise TypeError(f"{name}: key and value must be {query.dtype} as query is, got {key.dtype} and {value.dtype}")
    if key.shape != value.shape or key.shape[1] != heads or key.shape[3] != head_dim:
        raise ValueError(
            f"{name}: key and value must both be (b, {heads}, n, {head_dim}) for query {tuple(query.shape)},"
            f" got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: the width D of query must lie in [1, {MAX_HEAD_DIM}], got {head_dim}")
    if key.device != query.device or value.device != query.device:
        raise ValueError(
            f"{name}: key and value must be on {query.device} as query is, got {key.device} and {value.device}"
        )
    for argument, x, length in (("key_lengths", key_lengths, inputs), ("encoder_index", encoder_index, n_streams)):
        if x is None:
            continue
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: {argument} must be int32 or int64, got {x.dtype}")
        if x.shape != (length,):
            raise ValueError(f"{name}: {argument} must be ({length},), got {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"{name}: {argument} must be on {query.device} as query is, got {x.device}")
    if n_streams and not inputs:
        raise ValueError(f"{name}: {n_streams} streams need at least one input, got key {tuple(key.shape)}")
    if encoder_index is None and inputs and n_streams % inputs:
        raise ValueError(
            f"{name}: without encoder_index the number of streams must be a multiple of the number of inputs,"
            f" got {n_streams} streams and {inputs} inputs"
        )


def _check_values(key, key_lengths, encoder_index):
    inputs, n = key.shape[0], key.shape[2]
    if key_lengths is not None and inputs:
        low, high = (int(x) for x in key_lengths.aminmax())
        if low < 0 or high > n:
            raise ValueError(
                f"shared_cross_attention: key_lengths must lie in [0, {n}], got values from {low} to {high}"
            )
    if encoder_index is not None and encoder_index.numel():
        if bool((encoder_index[1:] < encoder_index[:-1]).any()):
            raise ValueError("shared_cross_attention: encoder_index must not decrease")
        low, high = int(encoder_index[0]), int(encoder_index[-1])
        if low < 0 or high >= inputs:
            raise ValueError(
                f"shared_cross_attention: encoder_index must lie in [0, {inputs}), got values from {low} to {high}"
            )


@torch.library.impl(_lib, "shared_cross_attention", "CompositeExplicitAutograd")
def _forward(query, key, value, key_lengths, encoder_index, scale, need_lse, impl):
    if (key_lengths is not None or encoder_index is not None) and (
        query.device.type == "cpu" or os.environ.get("PEFT_KERNELS_DEBUG") == "1"
    ):
        _check_values(key, key_lengths, encoder_index)
    if impl == "auto":  # resolved here, below the dispatcher, where shapes are never symbolic
        impl = choose(query, key)
    implementation = implementations.runnable("shared_cross_attention", impl, query.device.type, query.dtype)
    out, lse = implementation.forward(query, key, value, key_lengths, encoder_index, scale, need_lse)
    return out, lse if need_lse else out.new_empty(0, dtype=torch.promote_types(out.dtype, torch.float32))


@torch.library.impl(_lib, "shared_cross_attention_backward", "CompositeExplicitAutograd")
def _backward(
    grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, need_query, need_key,
    need_value, impl,
):  # fmt: skip
    needs = (need_query, need_key, need_value)
    if impl == "auto":
        impl = choose(query, key)
    gradients = implementations.module(impl).backward(
        grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs
    )
    return tuple(query.new_empty(0) if g is None else g for g in gradients)


@torch.library.register_fake("peft_kernels::shared_cross_attention", lib=_lib)
def _(query, key, value, key_lengths, encoder_index, scale, need_lse, impl):
    streams, heads, tokens, _ = query.shape
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    if need_lse:
        lse = token_major(streams, heads, tokens, like=query, dtype=lse_dtype)
    else:
        lse = query.new_empty(0, dtype=lse_dtype)
    return token_major(*query.shape, like=query), lse


@torch.library.register_fake("peft_kernels::shared_cross_attention_backward", lib=_lib)
def _(
    grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, need_query, need_key,
    need_value, impl,
):  # fmt: skip
    pairs = (query, need_query), (key, need_key), (value, need_value)
    return tuple(token_major(*x.shape, like=x) if needed else x.new_empty(0) for x, needed in pairs)


def _setup_context(ctx, inputs, output):
    query, key, value, key_lengths, encoder_index, ctx.scale, _, ctx.impl = inputs
    ctx.save_for_backward(query, key, value, *output, key_lengths, encoder_index)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_lse):
    query, key, value, out, lse, key_lengths, encoder_index = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if grad_out is None and grad_lse is None:
        return (None,) * 8
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    gradients = torch.ops.peft_kernels.shared_cross_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, ctx.scale, *needs, ctx.impl
    )
    return *(g if needed else None for g, needed in zip(gradients, needs)), None, None, None, None, None


torch.library.register_autograd(
    "peft_kernels::shared_cross_attention", _autograd, setup_context=_setup_context, lib=_lib
)
no_second_derivative(_lib, "shared_cross_attention_backward")
