"""The candidates that are timed together at one point of a sweep, and whether they agree."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

STOCK = "stock"
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative difference between two candidates through a whole model

Run = Callable[[], Any]


@dataclass(frozen=True)
class Agreement:
    agrees: bool
    text: str


@dataclass(frozen=True)
class Measurement:
    phase: str  # "generate", "first token", "forward", "training step"
    shape: dict[str, int]
    items: int  # number of items that a run processes
    item: str  # "tokens", "streams", "samples"
    candidates: dict[str, Callable[[], Run]]  # STOCK, OURS and others; each call returns a run with fresh state
    check: Callable[[dict[str, Any]], Agreement]  # takes the results of one run of every candidate
    missing: dict[str, str] = field(default_factory=dict)  # candidates that do not support this model, and why

    @property
    def case(self) -> tuple:
        return self.phase, tuple(self.shape.items())


class Subject(Protocol):
    """A method on a model, made from a source, whether to train, and the largest size on every axis."""

    kinds: tuple[str, ...]  # kinds of models that it supports
    trains: bool
    sizes: dict[str, int]  # default sizes by axis
    quick: dict[str, int]
    candidates: dict[str, str]  # descriptions

    def cases(self, point: dict[str, int]) -> Iterator[Measurement]: ...


def run_of(model: nn.Module, inputs: dict[str, Tensor], train: bool) -> Run:
    """A training step, or a forward that returns logits."""
    if train:
        return training_step(model, lambda: model(**inputs).loss)

    def forward():
        with torch.no_grad():
            return model(**inputs).logits

    return forward


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Run:
    """Forward, backward and AdamW on the trainable parameters of ``model``; the first step creates the optimizer's
    state.

    The learning rate is 0: the work is the same, and the weights do not change, so that the candidates can be compared
    at any time.
    """
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Turn off dropout and gradients."""
    training = [m for model in models for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def difference(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the expected tensor."""
    return float((result.float() - expected.float()).norm() / expected.float().norm())


def close(dtype: torch.dtype, differences: dict[str, float]) -> Agreement:
    """Whether all ``differences`` (name -> relative difference) are within the limit of ``dtype``."""
    limit = LIMITS[dtype]
    text = "; ".join(f"{what}: relative difference {error:.1e}" for what, error in differences.items())
    return Agreement(all(error <= limit for error in differences.values()), f"{text} (at most {limit:.0e})")
