"""The costs of locating special tokens and adding vectors to them."""

from collections.abc import Sequence

from torch import Tensor

from ..cost import Cost, gradient_bytes, nbytes

SLOT_BYTES = 4


def special_token_slots(
    input_ids: Tensor,
    special_ids: Tensor | Sequence[int],
    *,
    max_slots: int,
    attention_mask: Tensor | None = None,
    backward: bool = False,
) -> Cost:
    """The cost of reading ids and mask and writing positions; comparisons are not counted. There is no backward."""
    special_bytes = special_ids.nbytes if isinstance(special_ids, Tensor) else 8 * len(special_ids)
    return Cost(nbytes(input_ids, attention_mask) + special_bytes + input_ids.shape[0] * max_slots * SLOT_BYTES, 0)


def special_token_add(
    hidden: Tensor, vectors: Tensor, slots: Tensor, *, adapter_ids: Tensor | None = None, backward: bool = False
) -> Cost:
    """The cost of reading and writing all of ``hidden``.

    Backward costs as much as that of ``special_token_add_``: the gradient of ``hidden`` is that of the result.
    """
    cost = special_token_add_(hidden, vectors, slots, adapter_ids=adapter_ids, backward=backward)
    return Cost(cost.bytes + 2 * (hidden.nbytes - _rows_bytes(hidden, slots)), cost.operations)


def special_token_add_(
    hidden: Tensor, vectors: Tensor, slots: Tensor, *, adapter_ids: Tensor | None = None, backward: bool = False
) -> Cost:
    """The cost of reading and writing the rows in ``slots``.

    Backward sums the same rows of the gradient if ``vectors`` require one.
    """
    rows = _rows_bytes(hidden, slots)
    elements = rows // hidden.element_size()
    cost = Cost(2 * rows + nbytes(vectors, slots, adapter_ids), elements)
    if not backward or not vectors.requires_grad:
        return cost
    return Cost(cost.bytes + rows + gradient_bytes(vectors), 2 * elements)


def _rows_bytes(hidden, slots):
    return int((slots >= 0).sum()) * hidden.shape[2] * hidden.element_size()
