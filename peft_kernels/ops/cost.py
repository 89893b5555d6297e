"""The memory traffic and the arithmetic that every implementation of an operator needs."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of an algorithm that reads each input once, writes each output once, and has no temporary.

    With ``backward``, the gradients of the outputs are inputs too, and the gradients of the tensors that require one
    are outputs. An operator's cost function takes the operator's arguments, reads their shapes, lengths and
    ``requires_grad``, and computes nothing else.
    """

    bytes: int
    operations: int  # a multiplication and an addition are two; exponentials and comparisons are not counted


def nbytes(*tensors: Tensor | None) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


def gradient_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the gradients of the tensors that require one."""
    return nbytes(*(x for x in tensors if x is not None and x.requires_grad))
