"""The parts of an operator's benchmark: problems, and the candidates that solve them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Candidate:
    """A way to compute an operator: ``compute(*leaves)`` returns its outputs, differentiable in the leaves."""

    compute: Callable[..., Any]
    leaves: tuple[Tensor, ...] | None = None  # in the candidate's own layout; None: the problem's leaves
    # maps outputs and gradients to the operator's shapes, for the check
    restore: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    synchronizes: bool = False  # with the device, so it cannot be captured in a CUDA graph


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs of one call of an operator, and the candidates that compute it."""

    leaves: tuple[Tensor, ...]  # the inputs that take gradients
    grads: tuple[Tensor, ...]  # gradients of the outputs, in the outputs' shapes
    ours: Callable[[str], Candidate]  # impl -> candidate
    truth: Callable[..., Any]  # called with the leaves in float64
    cost: Callable[..., Any]  # called with the leaves and the keyword backward; returns a Cost
    # name -> function that prepares the baseline; it raises with a reason if the baseline cannot run here
    baselines: Mapping[str, Callable[[], Candidate]]
    # on a CPU: its time is the roofline bound; None: the cost over the measured peaks
    roofline: Callable[[], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A public operator, the problems on which it is measured, and how a report presents it."""

    name: str
    title: str
    about: str  # explains the letters of its shapes
    published: str | None = None  # the baseline of a paper or a library, quoted beside the strongest one
    shapes: tuple[dict[str, int], ...]  # the letters of the operator's docstring -> sizes
    quick_shapes: tuple[dict[str, int], ...]
    # shape, variant, dtype, device, backward
    problem: Callable[[Mapping[str, int], str, torch.dtype, str, bool], Problem]
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


class Sizes(NamedTuple):
    """Sizes of the calls that the tuner times. The defaults are those of a step that fills a large GPU."""

    batch: int = 32
    tokens: int = 512
    width: int = 1024
    vocabulary: int = 8192
    prompt: int = 60  # virtual tokens
    rank: int = 45
    specials: int = 4  # special tokens per row, and vectors
    texts: int = 4096
    classes: int = 16
    documents: int = 8  # encoder inputs of attention, each shared by many streams
    head_dims: tuple[int, ...] = (64, 128, 256)
    norm_widths: tuple[int, ...] = (512, 1024, 2048, 4096)
    prototype_widths: tuple[int, ...] = (64, 128, 256)


class Setting(NamedTuple):
    dtype: torch.dtype
    device: torch.device
    sizes: Sizes


class RandomInputs:
    """Seeded random tensors: the same order of draws gives the same tensors.

    They are drawn on the CPU, so that every device gets the same values; ``on_device`` draws on the device, which is
    faster for large tensors.
    """

    def __init__(self, device: str | torch.device, dtype: torch.dtype, on_device: bool = False):
        self.device, self.dtype, self.draw_device = device, dtype, device if on_device else "cpu"
        self.generator = torch.Generator(self.draw_device).manual_seed(0)

    @classmethod
    def of(cls, setting: Setting) -> "RandomInputs":
        return cls(setting.device, setting.dtype, on_device=True)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.draw_device).to(self.device, dtype or self.dtype)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """Draws int64 in [low, high)."""
        return torch.randint(low, high, size, generator=self.generator, device=self.draw_device).to(self.device)


def plain(compute: Callable[..., Any]) -> Callable[[], Candidate]:
    return lambda: Candidate(compute)


def compiled(compute: Callable[..., Any]) -> Callable[[], Candidate]:
    return lambda: Candidate(torch.compile(compute, fullgraph=True, dynamic=False))


def fresh(device: str, *outputs: Tensor) -> Callable[[], Any] | None:
    """Returns the roofline of an operator that allocates ``outputs``, on a CPU; None on other devices.

    It includes the page faults of new large tensors, which the measured copy bandwidth does not.
    """
    return (lambda: [x.clone() for x in outputs]) if device == "cpu" else None
