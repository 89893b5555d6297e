"""Cross-attention in which many decoder streams share the keys and values of one encoder input."""

from typing import Protocol

import torch
from torch import Tensor

from ..arguments import FLOATS, INTEGERS, Argument, Arguments, values_are_checked
from ..implementations import Implementation, Implementations, check_numbers, no_second_derivative
from .layout import token_major

__all__ = ["shared_cross_attention"]


class SharedCrossAttentionImplementation(Implementation, Protocol):
    def forward(self, query, key, value, key_lengths, encoder_index, scale, need_lse) -> tuple[Tensor, Tensor | None]:
        """Returns the output, and without ``need_lse`` anything instead of the log-sum-exp."""

    def backward(
        self, grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, need_query, need_key,
        need_value,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Returns the gradients of query, key and value; None for one that is not needed."""


implementations = Implementations(__name__, "reference", "sdpa", "matmul", "cpp", "triton")
MAX_HEAD_DIM = 256

ARGUMENTS = Arguments(
    query=Argument("N H t D", FLOATS),
    key=Argument("b H n D", like="query"),
    value=Argument("b H n D", like="query"),
    key_lengths=Argument("b", INTEGERS, values="[0, n]", optional=True),
    encoder_index=Argument("N", INTEGERS, values="[0, b)", optional=True),
    cu_streams=Argument("ends", INTEGERS, optional=True),  # b + 1
)

# Without the native library a CPU takes PyTorch's flash attention or two matmuls on folded rows, whichever
# `peft-kernels bench shared_cross_attention` showed to be faster: matmuls in these dtypes, while the scores of one head
# and input fit in the cache.
MATMUL_DTYPES = (torch.bfloat16,)
MATMUL_MAX_SCORE_BYTES = 8 << 20
AMX_ROWS = 64  # query rows per input from which the library's bfloat16 matmuls on AMX tiles beat our vector kernels

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "shared_cross_attention(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? encoder_index, Tensor?"
    " cu_streams, float scale, bool need_lse, str impl) -> (Tensor, Tensor)"
)
_lib.define(
    "shared_cross_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor"
    " out, Tensor lse, Tensor? key_lengths, Tensor? encoder_index, Tensor? cu_streams, float scale, bool need_query,"
    " bool need_key, bool need_value, str impl) -> (Tensor, Tensor, Tensor)"
)


def shared_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    encoder_index: Tensor | None = None,
    cu_streams: Tensor | None = None,
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
        cu_streams: (b + 1,) int32 or int64, with ``encoder_index``: the first stream of each input, and N. The Triton
            kernels need it; passing it saves its computation, where several calls have the same streams.
        scale: factor on the scores; ``D ** -0.5`` by default (T5: 1.0).
        return_lse: also return the natural log-sum-exp of the scaled scores; gradients flow through it.
        impl: ``"auto"``, or ``"reference"``, ``"sdpa"``, ``"matmul"``, ``"cpp"`` or ``"triton"``.

    Returns:
        (N, H, t, D) in ``query``'s dtype, laid out in memory as (N, t, H, D), so that ``out.transpose(1, 2)`` is
        contiguous. With ``return_lse``, also (N, H, t) in float32 (float64 for float64 inputs).

    Values of ``key_lengths``, ``encoder_index`` and ``cu_streams`` are checked on the CPU. On a GPU the check would
    synchronize with the device, so it runs only if the environment variable ``PEFT_KERNELS_DEBUG`` is 1.

    Raises:
        ValueError: invalid shapes, devices or values, or a named implementation that cannot run here; the message says
            why.
        TypeError: invalid dtypes.
    """
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value, key_lengths, encoder_index, cu_streams)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif type(scale) is not float:
        check_numbers("shared_cross_attention", scale=scale)
    implementations.check("shared_cross_attention", impl)
    need_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    need_lse = return_lse or need_grad
    arguments = query, key, value, key_lengths, encoder_index, cu_streams, scale, need_lse, impl
    if need_grad or torch.compiler.is_compiling():
        out, lse = torch.ops.peft_kernels.shared_cross_attention.default(*arguments)
    else:  # a third of the dispatcher's time is the layer that records gradients
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.peft_kernels.shared_cross_attention.default(*arguments)
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


def _check(query, key, value, key_lengths, encoder_index, cu_streams):
    name = "shared_cross_attention"
    sizes = ARGUMENTS.check(name, query, key, value, key_lengths, encoder_index, cu_streams)
    if not 1 <= sizes.D <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: head width D must be between 1 and {MAX_HEAD_DIM}, got {sizes.D}")
    if sizes.N and not sizes.b:
        raise ValueError(f"{name}: {sizes.N} streams need at least one input, got key {tuple(key.shape)}")
    if encoder_index is None and sizes.b and sizes.N % sizes.b:
        raise ValueError(
            f"{name}: without encoder_index the number of streams must be a multiple of the number of inputs,"
            f" got {sizes.N} streams and {sizes.b} inputs"
        )
    if cu_streams is not None and (encoder_index is None or sizes.ends != sizes.b + 1):
        given = "no encoder_index" if encoder_index is None else f"{sizes.ends} values for {sizes.b} inputs"
        raise ValueError(f"{name}: cu_streams must be (b + 1,) and come with encoder_index, got {given}")


def _check_values(key, key_lengths, encoder_index, cu_streams):
    name, sizes = "shared_cross_attention", {"b": key.shape[0], "n": key.shape[2]}
    lists = ARGUMENTS.check_values(name, key_lengths=key_lengths, encoder_index=encoder_index, **sizes)
    if encoder_index is not None:
        index = lists.get("encoder_index")
        if (encoder_index[1:] < encoder_index[:-1]).any() if index is None else index != sorted(index):
            raise ValueError(f"{name}: encoder_index must not decrease")
    if cu_streams is not None:
        starts = torch.searchsorted(encoder_index, torch.arange(key.shape[0] + 1, dtype=encoder_index.dtype))
        if not torch.equal(cu_streams.long(), starts):
            raise ValueError(
                f"{name}: cu_streams must be {starts.tolist()} for encoder_index, got {cu_streams.tolist()}"
            )


@torch.library.impl(_lib, "shared_cross_attention", "CompositeExplicitAutograd")
def _forward(query, key, value, key_lengths, encoder_index, cu_streams, scale, need_lse, impl):
    if (key_lengths is not None or encoder_index is not None) and values_are_checked(query):
        _check_values(key, key_lengths, encoder_index, cu_streams)
    if impl == "auto":  # resolved here, below the dispatcher, where shapes are never symbolic
        impl = choose(query, key)
    implementation = implementations.runnable("shared_cross_attention", impl, query.device.type, query.dtype)
    starts = (cu_streams,) if impl == "triton" else ()
    out, lse = implementation.forward(query, key, value, key_lengths, encoder_index, scale, need_lse, *starts)
    return out, lse if need_lse else out.new_empty(0, dtype=torch.promote_types(out.dtype, torch.float32))


@torch.library.impl(_lib, "shared_cross_attention_backward", "CompositeExplicitAutograd")
def _backward(
    grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, cu_streams, scale, need_query,
    need_key, need_value, impl,
):  # fmt: skip
    needs = (need_query, need_key, need_value)
    if impl == "auto":
        impl = choose(query, key)
    starts = (cu_streams,) if impl == "triton" else ()
    gradients = implementations.module(impl).backward(
        grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs, *starts
    )
    return tuple(query.new_empty(0) if g is None else g for g in gradients)


@torch.library.register_fake("peft_kernels::shared_cross_attention", lib=_lib)
def _(query, key, value, key_lengths, encoder_index, cu_streams, scale, need_lse, impl):
    streams, heads, tokens, _ = query.shape
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    if need_lse:
        lse = token_major(streams, heads, tokens, like=query, dtype=lse_dtype)
    else:
        lse = query.new_empty(0, dtype=lse_dtype)
    return token_major(*query.shape, like=query), lse


@torch.library.register_fake("peft_kernels::shared_cross_attention_backward", lib=_lib)
def _(
    grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, cu_streams, scale, need_query,
    need_key, need_value, impl,
):  # fmt: skip
    pairs = (query, need_query), (key, need_key), (value, need_value)
    return tuple(token_major(*x.shape, like=x) if needed else x.new_empty(0) for x, needed in pairs)


def _setup_context(ctx, inputs, output):
    query, key, value, key_lengths, encoder_index, cu_streams, ctx.scale, _, ctx.impl = inputs
    ctx.save_for_backward(query, key, value, *output, key_lengths, encoder_index, cu_streams)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_lse):
    query, key, value, out, lse, key_lengths, encoder_index, cu_streams = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if grad_out is None and grad_lse is None:
        return (None,) * 9
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    gradients = torch.ops.peft_kernels.shared_cross_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, cu_streams, ctx.scale, *needs,
        ctx.impl,
    )  # fmt: skip
    return *(g if needed else None for g, needed in zip(gradients, needs)), *(None,) * 6


torch.library.register_autograd(
    "peft_kernels::shared_cross_attention", _autograd, setup_context=_setup_context, lib=_lib
)
no_second_derivative(_lib, "shared_cross_attention_backward")
