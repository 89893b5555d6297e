"""Several sequences in one row, which a prompt in front of the row does not fit."""

import torch
from torch import Tensor

# what DataCollatorWithFlattening and continuous batching add to such rows; kernels without padding read the lengths
_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cu_seqlens", "block_table")
_REFUSED = "DePT: a row must hold one sequence, because each would need its own prompt, but {}"


def check(kwargs: dict, mask: Tensor | None) -> None:
    """Raises where a row holds several sequences.

    Looking at positions that live on a GPU waits for it; only a user who gives them pays. In a graph of ``torch.compile`` an assertion
    on the device looks.

    Raises:
        ValueError: arguments that describe several sequences, or positions that start again.
    """
    if given := [name for name in _ARGUMENTS if kwargs.get(name) is not None]:
        raise ValueError(_REFUSED.format(f"{', '.join(given)} {'describes' if len(given) == 1 else 'describe'} several"))
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
    """(B, L) whether a token stands behind every one before it. Without a mask, transformers takes a gap for the end of a sequence as well."""
    if mask is None:
        return positions.diff(dim=1) == 1
    seen = mask.bool()
    least = positions.min() - 1
    before = torch.where(seen, positions, least).cummax(1).values[:, :-1]  # of the tokens so far
    return (positions[:, 1:] > before) | ~seen[:, 1:]
