"""What a benchmark of an operator consists of: problems, and candidates that solve them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Candidate:
    """``compute(*leaves)`` gives the operator's output, a tensor or several, differentiable in the leaves."""

    compute: Callable[..., Any]
    leaves: tuple[Tensor, ...] | None = None  # in a layout of its own; None: the problem's
    restore: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None  # outputs and gradients to the operator's shapes, for the check
    waits: bool = False  # for the device, so that it is no CUDA graph


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs of one call of an operator, and the candidates that compute it."""

    leaves: tuple[Tensor, ...]  # take gradients
    grads: tuple[Tensor, ...]  # of the outputs; their shapes are the outputs'
    ours: Callable[[str], Candidate]  # of impl
    truth: Callable[..., Any]  # of the leaves in float64
    cost: Callable[..., Any]  # of the leaves and, by keyword, backward: a Cost
    baselines: Mapping[str, Callable[[], Candidate]]  # each is prepared once, and raises where it does not apply here, with the reason
    roofline: Callable[[], Any] | None = None  # on a CPU: its time is the roofline bound; None: the cost over the measured peaks


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A public operator, and the problems on which it is measured."""

    name: str
    shapes: tuple[dict[str, int], ...]  # the letters of the operator's docstring -> sizes
    quick_shapes: tuple[dict[str, int], ...]
    problem: Callable[[Mapping[str, int], str, torch.dtype, str, bool], Problem]  # shape, variant, dtype, device, backward
    variants: tuple[str, ...] = ("",)
    dtypes: tuple[str, ...] = DTYPES  # or int64 alone
    has_backward: bool = True

    @property
    def letters(self) -> list[str]:
        return list(self.shapes[0])

    @property
    def is_integer(self) -> bool:
        return self.dtypes == ("int64",)

    @property
    def default_dtypes(self) -> list[str]:
        return [dtype for dtype in self.dtypes if dtype != "float16"]


class RandomInputs:
    """Seeded, and drawn on the CPU: the same on every device."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, generator=self.generator).to(self.device, dtype or self.dtype)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """int64 in [low, high)"""
        return torch.randint(low, high, size, generator=self.generator).to(self.device)


def plain(compute: Callable[..., Any]) -> Callable[[], Candidate]:
    return lambda: Candidate(compute)


def compiled(compute: Callable[..., Any]) -> Callable[[], Candidate]:
    return lambda: Candidate(torch.compile(compute, fullgraph=True, dynamic=False))


def fresh(device: str, *outputs: Tensor) -> Callable[[], Any] | None:
    """The roofline bound of an operator with ``outputs`` like these: a CPU pays for the pages of a new large tensor, which a copy does not show."""
    return (lambda: [x.clone() for x in outputs]) if device == "cpu" else None
