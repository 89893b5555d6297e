"""What an operator cannot do without: bytes that move and operations that are done, whatever the implementation."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Of the minimal algorithm: each input read once, each output written once, and nothing in between touches memory.

    With ``backward`` the gradients of the outputs are inputs too, and the gradients of what requires one are outputs. An operator's own
    cost function takes the operator's arguments, looks at their shapes, lengths and ``requires_grad``, and runs nothing.
    """

    bytes: int
    operations: int  # a multiplication and an addition are two; exponentials and comparisons are not counted


def nbytes(*tensors: Tensor | None) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


def gradient_bytes(*tensors: Tensor | None) -> int:
    """Of the gradients of those that require one."""
    return nbytes(*(x for x in tensors if x is not None and x.requires_grad))
