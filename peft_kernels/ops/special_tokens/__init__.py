"""Addition of vectors to the special tokens of a batch, which are located once for all layers."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..arguments import FLOATS, INTEGERS, Argument, Arguments, values_are_checked
from ..implementations import Implementation, Implementations, check_numbers, no_second_derivative
from ..vector_dropout import draw_seed

__all__ = ["special_token_add", "special_token_add_", "special_token_slots"]


class SpecialTokensImplementation(Implementation, Protocol):
    def slots(self, input_ids, special_ids, attention_mask, max_slots) -> tuple[Tensor, Tensor]:
        """Returns the slots, (B, max_slots), and the number of special tokens of every row, (B,)."""

    def add_(self, hidden, vectors, slots, dropout_p, seed, adapter_ids) -> None:
        """Adds the vectors (K, P, d) in place."""

    def backward(self, grad, slots, adapters, vectors, dropout_p, seed, adapter_ids) -> Tensor:
        """Returns the gradient of the vectors, (K, P, d); ``adapters`` and ``vectors`` are the numbers K and P."""


implementations = Implementations(__name__)

MAX_LISTED_SLOTS = 256  # up to this number, slots are checked in Python: a call of a tensor function would cost more


def injection(like: str, optional: bool = False) -> dict[str, Argument]:
    """Declares what is added to a tensor (B, S, d), the argument ``like``."""
    return {
        "vectors": Argument("P d | K P d", like=like, or_float32=True, at_least_1="P", optional=optional),
        "slots": Argument("B k", INTEGERS, values="[-1, S)", optional=optional),
        "adapter_ids": Argument("B", INTEGERS, values="[-1, K)", optional=True),
    }


SLOTS = Arguments(
    input_ids=Argument("B S", INTEGERS),
    special_ids=Argument("n", INTEGERS),
    attention_mask=Argument("B S", optional=True),
)
ADD = Arguments(hidden=Argument("B S d", FLOATS), **injection("hidden"))

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
    if not isinstance(special_ids, Tensor):
        special_ids = list(special_ids)
        for token in special_ids:
            if isinstance(token, float) or token is None:
                raise TypeError(f"{name}: special_ids must be integers, got {token!r}")
        special_ids = torch.tensor(special_ids, dtype=torch.long).to(input_ids.device, non_blocking=True)
    SLOTS.check(name, input_ids, special_ids, attention_mask)
    if max_slots < 0:
        raise ValueError(f"{name}: max_slots must be at least 0, got {max_slots}")
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
    sizes = ADD.check(name, hidden, vectors, slots, adapter_ids)
    vectors, seed = check_injection(name, sizes, hidden, vectors, dropout_p, seed, adapter_ids)
    return hidden, vectors, slots, dropout_p, seed, adapter_ids, impl


def check_injection(name, sizes, hidden, vectors, dropout_p, seed, adapter_ids) -> tuple[Tensor, Tensor | None]:
    """Checks what ``injection`` does not declare; returns ``vectors`` with an adapter dimension and in at least
    float32, and the seed as a tensor.
    """
    if adapter_ids is None and sizes.K is not None and sizes.K != 1:
        raise ValueError(f"{name}: adapter_ids must select among the {sizes.K} adapters of vectors")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{name}: dropout_p must lie in [0, 1), got {dropout_p}")
    check_numbers(name, dropout_p=dropout_p)
    if seed is not None:
        _check_seed(name, seed, hidden.device)
    vectors = vectors.to(torch.promote_types(hidden.dtype, torch.float32))
    return vectors if vectors.ndim == 3 else vectors[None], draw_seed(seed, hidden.device) if dropout_p else None


def _check_seed(name, seed, device):
    if not hasattr(seed, "__index__"):  # tensors have __index__ too
        raise TypeError(f"{name}: seed must be an integer or a tensor, got a {type(seed).__name__}")
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name}: seed must lie in [-2**63, 2**63), got {seed}")
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"{name}: seed must be a number or one int64, got {tuple(seed.shape)} of {seed.dtype}")
    if isinstance(seed, Tensor) and seed.device != device:
        raise ValueError(f"{name}: seed must be on {device} like vectors, got {seed.device}")


def check_injection_values(name, length, vectors, slots, adapter_ids):
    """Checks for values that would make a kernel read out of bounds or write twice; on a GPU only with
    ``PEFT_KERNELS_DEBUG=1``.
    """
    if not values_are_checked(slots):
        return
    lists = ADD.check_values(name, slots=slots, S=length, adapter_ids=adapter_ids, K=vectors.shape[0])
    if slots.numel() > MAX_LISTED_SLOTS:
        repeats = _row_with_repeats(slots)
    else:  # in Python: a single call of a tensor function would cost more
        repeats = next((row for row in lists.get("slots") or slots.tolist() if _has_repeats(row)), None)
    if repeats is not None:
        raise ValueError(f"{name}: slots must have every position of a row once, got {repeats}")


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
