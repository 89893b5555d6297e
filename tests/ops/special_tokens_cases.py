"""Inputs of the operators on special tokens, and their formula."""

import against_reference
import torch

from peft_kernels.ops import special_token_add, special_token_add_
from peft_kernels.ops.vector_dropout import factors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (batch, tokens, width, vectors, adapters), slots of each row, adapter_ids
CASES = {
    "plain": ((2, 7, 32, 2, 0), [[0, 6], [0, 3]], None),
    "rows that differ": ((4, 9, 40, 3, 0), [[0, 4, 8], [0, 5, -1], [-1, -1, -1], [2, 3, 4]], None),
    "one of all": ((1, 1, 1, 1, 0), [[0]], None),
    "odd width": ((2, 5, 101, 2, 0), [[1, 4], [0, -1]], None),
    "wide": ((2, 3, 2056, 1, 0), [[1], [0]], None),
    "more slots than vectors": ((2, 8, 24, 2, 0), [[0, 2, 4, 6, 7], [1, 3, -1, -1, -1]], None),
    "more vectors than slots": ((2, 8, 24, 4, 0), [[0, 2], [1, -1]], None),
    "unordered": ((2, 6, 16, 3, 0), [[5, -1, 0], [-1, 4, 2]], None),
    "no slot": ((2, 6, 16, 3, 0), [[], []], None),
    "no token": ((2, 0, 16, 3, 0), [[-1], [-1]], None),
    "no row": ((0, 5, 16, 2, 0), [], None),
    "one stacked": ((2, 5, 16, 2, 1), [[0, 4], [0, 2]], None),
    "adapters": ((6, 7, 72, 2, 3), [[0, 6], [0, 3], [1, 2], [0, -1], [4, 5], [0, 1]], [2, -1, 0, 2, 2, 0]),
    "none": ((2, 4, 16, 2, 2), [[0, 3], [0, 2]], [-1, -1]),
}


def make(case, dtype=torch.float32, device="cpu", seed=0):
    """hidden, vectors, slots, adapter_ids."""
    (batch, length, width, count, adapters), slots, adapter_ids = case
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator).to(device, dtype)
    vectors = torch.randn(*((adapters,) if adapters else ()), count, width, generator=generator).to(device)
    slots = torch.tensor(slots, dtype=torch.int32, device=device).reshape(batch, -1 if batch else 0)
    return (
        hidden,
        vectors,
        slots,
        adapter_ids if adapter_ids is None else torch.tensor(adapter_ids, dtype=torch.long, device=device),
    )


def by_hand(hidden, vectors, slots, *, adapter_ids=None, dropout_p=0.0, seed=None):
    """The formula, one token at a time; autograd computes the gradients."""
    vectors = vectors if vectors.ndim == 3 else vectors[None]
    kept = None
    if dropout_p:
        kept = factors(dropout_p, torch.tensor([seed], device=hidden.device), *slots.shape, hidden.shape[2]).to(
            hidden.dtype
        )
    rows = []
    for b, positions in enumerate(slots.tolist()):
        adapter = 0 if adapter_ids is None else int(adapter_ids[b])
        tokens = list(hidden[b])
        for j, position in enumerate(positions):
            if position >= 0 and adapter >= 0:
                vector = vectors[adapter, min(j, vectors.shape[1] - 1)]
                tokens[position] = tokens[position] + (vector if kept is None else kept[b, j] * vector)
        rows.append(torch.stack(tokens) if tokens else hidden[b])
    return torch.stack(rows) if rows else hidden * 1


def compare(add, hidden, vectors, slots, **options):
    """Assert equality within rounding of plain PyTorch in the same dtype."""
    against_reference.compare(add, by_hand, (hidden, vectors), slots, **options)


def of(impl):
    return lambda *args, **kwargs: special_token_add(*args, **kwargs, impl=impl)


def in_place(impl):
    return lambda hidden, *args, **kwargs: special_token_add_(hidden * 1, *args, **kwargs, impl=impl)
