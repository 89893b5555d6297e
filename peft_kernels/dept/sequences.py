"""Refusal of rows that hold several sequences, each of which would need its own prompt."""

import torch
from torch import Tensor

# arguments that DataCollatorWithFlattening and continuous batching add for such rows; varlen attention kernels read
# them
_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cu_seqlens", "block_table")
_REFUSED = "DePT: a row must hold one sequence, because each would need its own prompt, but {}"


def check(kwargs: dict, mask: Tensor | None) -> None:
    """Check that every row holds one sequence.

    Reading ``position_ids`` on a GPU synchronizes; this happens only if they are given. Under ``torch.compile`` the
    check is an assertion on the device.

    Raises:
        ValueError: an argument describes several sequences, or positions start again within a row.
    """
    if names := [name for name in _ARGUMENTS if kwargs.get(name) is not None]:
        verb = "describes" if len(names) == 1 else "describe"
        raise ValueError(_REFUSED.format(f"{', '.join(names)} {verb} several"))
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim != 2 or positions.shape[1] < 2:
        return
    follows = _follow(positions, mask).all()
    message = _REFUSED.format("position_ids start again within a row")
    if torch.compiler.is_compiling():
        torch._assert_async(follows, message)
    elif not follows:
        raise ValueError(message)


def _follow(positions, mask):
    """Whether each token's position exceeds all earlier ones.

    Without a mask it must rise by 1: to transformers, a gap ends a sequence too.
    """
    if mask is None:
        return positions.diff(dim=1) == 1
    unmasked = mask.bool()
    largest = torch.where(unmasked, positions, positions.min() - 1).cummax(1).values[:, :-1]  # so far
    return (positions[:, 1:] > largest) | ~unmasked[:, 1:]
