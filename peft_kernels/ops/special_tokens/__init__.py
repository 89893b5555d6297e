"""Addition of vectors to the special tokens of a batch, which are located once for all layers."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..implementations import Implementations, check_numbers, no_second_derivative
from ..vector_dropout import draw_seed

__all__ = ["special_token_add", "special_token_add_", "special_token_slots"]

# Each implementation has slots(input_ids, special_ids, attention_mask, max_slots) -> slots, counts; add_(hidden,
# vectors, slots, dropout_p, seed, adapter_ids); and backward(grad, slots, adapters, vectors, dropout_p, seed,
# adapter_ids) -> gradient of the vectors.
implementations = Implementations(__name__)

MAX_LISTED_SLOTS = 256  # up to this number, slots are checked in Python: a call of a tensor function would cost more

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "special_token_slots(Tensor input_ids, Tensor special_ids, Tensor? attention_mask, SymInt max_slots, str impl) ->"
    " Tensor"
)
_lib.define(
    "special_token_add(Tensor hidden, Tensor vectors, Tensor slots, float dropout_p, Tensor? seed, Tensor? adapter_ids,"
    " str impl) -> Tensor"
)
_lib.define(
    "special_token_add_(Tensor(a!) hidden, Tensor vectors, Tensor slots, float dropout_p, Tensor? seed, Tensor?"
    " adapter_ids, str impl) -> ()"
)
_lib.define(
    "special_token_add_backward(Tensor grad, Tensor slots, SymInt adapters, SymInt vectors, float dropout_p, Tensor?"
    " seed, Tensor? adapter_ids, str impl) -> Tensor"
)


def special_token_slots(
    input_ids: Tensor,
    special_ids: Tensor | Sequence[int],
    *,
    max_slots: int,
    attention_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Find the positions of the special tokens in every row, in order; once per batch, for all layers.

    Special token adaptation (PASTA), arXiv 2210.04382, section 3.

    Args:
        input_ids: (B, S) int32 or int64.
        special_ids: (n,) int32 or int64, the ids of special tokens; a sequence of numbers is copied to the device.
        max_slots: the maximum number of special tokens in a row.
        attention_mask: (B, S), integer, bool or float; a special token at a 0 is padding and does not count. None: no
            padding.
        impl: ``"auto"``, or ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.

    Returns:
        (B, max_slots) int32: positions, ascending, then -1 in the unused slots.

    The call does not synchronize with the device. A row with more special tokens than ``max_slots`` raises on the CPU;
    on a GPU it fails a device-side assertion, which surfaces at the next synchronization.

    Raises:
        ValueError: invalid shapes, devices or values, too many special tokens, or a named implementation that cannot
            run here.
        TypeError: invalid dtypes.
    """
    name = "special_token_slots"
    implementations.check(name, impl)
    if input_ids.ndim != 2:
        raise ValueError(f"{name}: input_ids must be (B, S), got {tuple(input_ids.shape)}")
    if not isinstance(special_ids, Tensor):
        special_ids = list(special_ids)
        for token in special_ids:
            if isinstance(token, float) or token is None:
                raise TypeError(f"{name}: special_ids must be integers, got {token!r}")
        special_ids = torch.tensor(special_ids, dtype=torch.long).to(input_ids.device, non_blocking=True)
    if special_ids.ndim != 1:
        raise ValueError(f"{name}: special_ids must be (n,), got {tuple(special_ids.shape)}")
    for argument, x in (("input_ids", input_ids), ("special_ids", special_ids)):
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: {argument} must be int32 or int64, got {x.dtype}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"{name}: attention_mask must be {tuple(input_ids.shape)} as input_ids is, got"
            f" {tuple(attention_mask.shape)}"
        )
    if max_slots < 0:
        raise ValueError(f"{name}: max_slots must be at least 0, got {max_slots}")
    _check_devices(name, "input_ids", input_ids, special_ids=special_ids, attention_mask=attention_mask)
    return torch.ops.peft_kernels.special_token_slots.default(input_ids, special_ids, attention_mask, max_slots, impl)


def special_token_add(
    hidden: Tensor,
    vectors: Tensor,
    slots: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    adapter_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Add a vector to every special token: ``out[b, slots[b, j]] = hidden[b, slots[b, j]] + vectors[min(j, P - 1)]``.

    Special token adaptation (PASTA), arXiv 2210.04382, equation 1.

    Args:
        hidden: (B, S, d); float32, float16, bfloat16 or float64.
        vectors: (P, d), or (K, P, d) for K adapters; in ``hidden``'s dtype or float32. P is at least 1.
        slots: (B, k) int32 or int64 in [-1, S), the positions of a row's special tokens (``special_token_slots``),
            without repeats; -1: an unused slot. Slots from P on get the last vector.
        dropout_p: probability, in [0, 1), that an element of a vector is dropped, drawn for every row and slot; the
            kept elements are divided by 1 - dropout_p.
        seed: seed of the dropout, a number or (1,) int64; None: drawn from torch's generator. The draws also depend on
            row, slot and column.
        adapter_ids: (B,) int32 or int64 in [-1, K): the adapter of each row; -1: nothing is added. Required if K > 1.
        impl: ``"auto"``, or ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.

    Returns:
        (B, S, d) in ``hidden``'s dtype, contiguous. Sums are in float32 (float64 for float64 inputs).

    The gradient of ``hidden`` is that of the result; the gradient of ``vectors`` is summed over the rows in a fixed
    order.

    Values of ``slots`` and ``adapter_ids`` are checked on the CPU. On a GPU the check would synchronize with the
    device, so it runs only if the environment variable ``PEFT_KERNELS_DEBUG`` is 1.

    Raises:
        ValueError: invalid shapes, devices or values, or a named implementation that cannot run here; the message says
            why.
        TypeError: invalid dtypes.
    """
    arguments = _checked("special_token_add", hidden, vectors, slots, dropout_p, seed, adapter_ids, impl)
    return torch.ops.peft_kernels.special_token_add.default(*arguments)


def special_token_add_(
    hidden: Tensor,
    vectors: Tensor,
    slots: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    adapter_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``special_token_add`` in place: reads and writes only the rows in ``slots``. Returns ``hidden``."""
    arguments = _checked("special_token_add_", hidden, vectors, slots, dropout_p, seed, adapter_ids, impl)
    if torch.is_grad_enabled() and (hidden.requires_grad or vectors.requires_grad):
        return _AddInPlace.apply(*arguments)
    torch.ops.peft_kernels.special_token_add_.default(*arguments)
    return hidden


def _checked(name, hidden, vectors, slots, dropout_p, seed, adapter_ids, impl):
    implementations.check(name, impl)
    if hidden.ndim != 3:
        raise ValueError(f"{name}: hidden must be (B, S, d), got {tuple(hidden.shape)}")
    vectors, seed = check_injection(name, "hidden", hidden, vectors, slots, dropout_p, seed, adapter_ids)
    return hidden, vectors, slots, dropout_p, seed, adapter_ids, impl


def check_injection(
    name, hidden_name, hidden, vectors, slots, dropout_p, seed, adapter_ids
) -> tuple[Tensor, Tensor | None]:
    """Checks the arguments; returns ``vectors`` as (K, P, d) in at least float32, and the seed as a tensor."""
    batch, _, width = hidden.shape
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"{name}: {hidden_name} must be float32, float16, bfloat16 or float64, got {hidden.dtype}")
    if vectors.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(f"{name}: vectors must be {hidden.dtype} as {hidden_name} is, or float32, got {vectors.dtype}")
    if vectors.ndim not in (2, 3) or vectors.shape[-1] != width or vectors.shape[-2] < 1:
        raise ValueError(
            f"{name}: vectors must be (P, {width}) or (K, P, {width}) with at least one row, got {tuple(vectors.shape)}"
        )
    if slots.ndim != 2 or slots.shape[0] != batch:
        raise ValueError(f"{name}: slots must be ({batch}, k), got {tuple(slots.shape)}")
    if adapter_ids is None and vectors.ndim == 3 and vectors.shape[0] != 1:
        raise ValueError(f"{name}: adapter_ids must select among the {vectors.shape[0]} adapters of vectors, got None")
    if adapter_ids is not None and adapter_ids.shape != (batch,):
        raise ValueError(f"{name}: adapter_ids must be ({batch},), got {tuple(adapter_ids.shape)}")
    for argument, x in (("slots", slots), ("adapter_ids", adapter_ids)):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: {argument} must be int32 or int64, got {x.dtype}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{name}: dropout_p must lie in [0, 1), got {dropout_p}")
    check_numbers(name, dropout_p=dropout_p)
    if seed is not None and not hasattr(seed, "__index__"):  # tensors have __index__ too
        raise TypeError(f"{name}: seed must be an integer or a tensor, got a {type(seed).__name__}")
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name}: seed must lie in [-2**63, 2**63), got {seed}")
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"{name}: seed must be a number or one int64, got {tuple(seed.shape)} of {seed.dtype}")
    seed_tensor = seed if isinstance(seed, Tensor) else None
    _check_devices(name, hidden_name, hidden, vectors=vectors, slots=slots, seed=seed_tensor, adapter_ids=adapter_ids)
    vectors = vectors.to(torch.promote_types(hidden.dtype, torch.float32))
    return vectors if vectors.ndim == 3 else vectors[None], draw_seed(seed, hidden.device) if dropout_p else None


def _check_devices(name, like_name, like, **tensors):
    for argument, x in tensors.items():
        if x is not None and x.device != like.device:
            raise ValueError(f"{name}: {argument} must be on {like.device} as {like_name} is, got {x.device}")


def check_injection_values(name, length, vectors, slots, adapter_ids):
    """Checks that no kernel reads out of bounds or writes a row twice; on a GPU only with ``PEFT_KERNELS_DEBUG=1``."""
    if slots.device.type != "cpu" and os.environ.get("PEFT_KERNELS_DEBUG") != "1":
        return
    rows = slots.tolist() if 0 < slots.numel() <= MAX_LISTED_SLOTS else None
    for argument, x, end in (("slots", slots, length), ("adapter_ids", adapter_ids, vectors.shape[0])):
        if x is not None and x.numel():
            if argument == "slots" and rows is not None:
                low, high = min(map(min, rows)), max(map(max, rows))
            else:
                low, high = (int(v) for v in x.aminmax())
            if low < -1 or high >= end:
                raise ValueError(f"{name}: {argument} must lie in [-1, {end}), got values from {low} to {high}")
    if rows is None:
        repeated = _row_with_repeats(slots)
    else:
        repeated = next((row for row in rows if _has_repeats(row)), None)
    if repeated is not None:
        raise ValueError(f"{name}: slots must have every position of a row once, got {repeated}")


def _has_repeats(row: list[int]) -> bool:
    return len(set(row)) < len(row) and len(set(row)) != len(row) - row.count(-1) + 1


def _row_with_repeats(slots: Tensor) -> list[int] | None:
    """Returns a row that has a position twice, or None."""
    ordered = slots.sort(1).values
    has_repeats = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    return slots[int(has_repeats.int().argmax())].tolist() if bool(has_repeats.any()) else None


@torch.library.impl(_lib, "special_token_slots", "CompositeExplicitAutograd")
def _slots(input_ids, special_ids, attention_mask, max_slots, impl):
    name = "special_token_slots"
    implementation = implementations.resolve(name, impl, input_ids.device.type, torch.float32)
    slots, counts = implementation.slots(input_ids, special_ids, attention_mask, max_slots)
    if counts.device.type != "cpu":
        message = f"{name}: a row has more than max_slots={max_slots} special tokens"
        torch._assert_async((counts <= max_slots).all(), message)
    elif counts.numel() and int(counts.max()) > max_slots:
        row = int(counts.argmax())
        raise ValueError(f"{name}: max_slots={max_slots}, but row {row} has {int(counts[row])} special tokens")
    return slots


@torch.library.impl(_lib, "special_token_add_", "CompositeExplicitAutograd")
def _add_(hidden, vectors, slots, dropout_p, seed, adapter_ids, impl):
    """Adds in place, with the checks of torch's own in-place operators, and counts a version for autograd."""
    if hidden.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            "special_token_add_: hidden is an inference tensor, which changes only in torch.inference_mode(): clone it"
        )
    if _overlaps(hidden):
        raise ValueError(
            f"special_token_add_: elements of hidden must not share memory, got strides {hidden.stride()} of"
            f" {tuple(hidden.shape)}: clone it"
        )
    if vectors.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr():
        vectors = vectors.clone()
    _add_to(hidden, vectors, slots, dropout_p, seed, adapter_ids, impl)
    if not hidden.is_inference():
        torch.autograd.graph.increment_version(hidden)


def _add_to(hidden, vectors, slots, dropout_p, seed, adapter_ids, impl):
    check_injection_values("special_token_add", hidden.shape[1], vectors, slots, adapter_ids)
    implementations.resolve("special_token_add", impl, hidden.device.type, hidden.dtype).add_(
        hidden, vectors, slots, dropout_p, seed, adapter_ids
    )


def _overlaps(x: Tensor) -> bool:
    """Returns whether elements share memory, as in expanded or windowed tensors.

    They do if a stride is no larger than the extent of the dimensions with smaller strides.
    """
    extent = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1):
        if stride <= extent:
            return x.numel() > 0
        extent += stride * (size - 1)
    return False


@torch.library.impl(_lib, "special_token_add", "CompositeExplicitAutograd")
def _add(hidden, vectors, slots, dropout_p, seed, adapter_ids, impl):
    out = hidden.clone(memory_format=torch.contiguous_format)
    _add_to(out, vectors, slots, dropout_p, seed, adapter_ids, impl)
    return out


@torch.library.impl(_lib, "special_token_add_backward", "CompositeExplicitAutograd")
def _add_backward(grad, slots, adapters, vectors, dropout_p, seed, adapter_ids, impl):
    implementation = implementations.resolve("special_token_add", impl, grad.device.type, grad.dtype)
    return implementation.backward(grad, slots, adapters, vectors, dropout_p, seed, adapter_ids)


@torch.library.register_fake("peft_kernels::special_token_slots", lib=_lib)
def _(input_ids, special_ids, attention_mask, max_slots, impl):
    return input_ids.new_empty(input_ids.shape[0], max_slots, dtype=torch.int32)


@torch.library.register_fake("peft_kernels::special_token_add_", lib=_lib)
def _(hidden, vectors, slots, dropout_p, seed, adapter_ids, impl):
    return None


@torch.library.register_fake("peft_kernels::special_token_add", lib=_lib)
def _(hidden, vectors, slots, dropout_p, seed, adapter_ids, impl):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.register_fake("peft_kernels::special_token_add_backward", lib=_lib)
def _(grad, slots, adapters, vectors, dropout_p, seed, adapter_ids, impl):
    return grad.new_empty(adapters, vectors, grad.shape[2], dtype=torch.promote_types(grad.dtype, torch.float32))


def _setup_context(ctx, inputs, output):
    _, vectors, slots, ctx.dropout_p, seed, adapter_ids, ctx.impl = inputs
    ctx.sizes = vectors.shape[:2]
    ctx.save_for_backward(slots, seed, adapter_ids)


def _autograd(ctx, grad):
    slots, seed, adapter_ids = ctx.saved_tensors
    grad_vectors = None
    if ctx.needs_input_grad[1]:
        grad_vectors = torch.ops.peft_kernels.special_token_add_backward.default(
            grad, slots, *ctx.sizes, ctx.dropout_p, seed, adapter_ids, ctx.impl
        )
    return grad, grad_vectors, None, None, None, None, None


torch.library.register_autograd("peft_kernels::special_token_add", _autograd, setup_context=_setup_context, lib=_lib)
no_second_derivative(_lib, "special_token_add_backward")


class _AddInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, *arguments):
        ctx.mark_dirty(hidden)
        _setup_context(ctx, (hidden, *arguments), hidden)
        torch.ops.peft_kernels.special_token_add_.default(hidden, *arguments)
        return hidden

    backward = staticmethod(_autograd)
