"""The implementations of an operator: modules of its package with one interface, imported on first use."""

from contextlib import nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

_imported = cache(import_module)


class Implementations:
    """The implementations of one operator.

    Each module has ``unavailable(device_type, dtype)``, which returns a reason or None, and the functions that the
    operator's package lists.
    """

    def __init__(self, package: str, *names: str):
        self.package = package
        self.names = names or ("reference", "cpp", "cuda", "triton")

    def module(self, impl: str) -> ModuleType:
        return _imported(f"{self.package}.{impl}")

    def unavailable(self, impl: str, device: str, dtype: torch.dtype) -> str | None:
        """Returns why ``impl`` cannot run, or None."""
        return self.module(impl).unavailable(device, dtype)

    def check(self, operator: str, impl: str) -> None:
        if impl != "auto" and impl not in self.names:
            raise ValueError(f"{operator}: impl must be 'auto' or one of {list(self.names)}, got {impl!r}")
        # torch silently drops the tangents of operators without a forward-mode formula
        if forward_ad._current_level >= 0:
            raise NotImplementedError(f"{operator}: forward-mode differentiation is not implemented")

    def runnable(self, operator: str, impl: str, device: str, dtype: torch.dtype) -> ModuleType:
        if reason := self.unavailable(impl, device, dtype):
            raise ValueError(f"{operator}: impl={impl!r} cannot run here: {reason}")
        return self.module(impl)

    def choose(self, device: str, dtype: torch.dtype) -> str:
        """Returns the implementation behind ``impl="auto"``, forward and backward: the first row that applies.

        An operator with a table of its own does not use this one.

        | case                                        | implementation |
        | ------------------------------------------- | -------------- |
        | float64                                     | reference      |
        | CPU, native library built                   | cpp            |
        | CUDA, native CUDA library built             | cuda           |
        | CUDA or ROCm, triton                        | triton         |
        | anything else                               | reference      |
        """
        for impl in (name for name in ("cpp", "cuda", "triton") if name in self.names):
            if self.unavailable(impl, device, dtype) is None and (impl != "triton" or device != "cpu"):
                return impl
        return "reference"

    def resolve(self, operator: str, impl: str, device: str, dtype: torch.dtype) -> ModuleType:
        if impl == "auto":
            return self.module(self.choose(device, dtype))
        return self.runnable(operator, impl, device, dtype)


def no_second_derivative(lib: torch.library.Library, operator: str) -> None:
    """Makes a backward operator raise when it is differentiated. Otherwise torch would silently drop a term."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{operator.removesuffix('_backward')}: second derivatives are not implemented")

    torch.library.register_autograd(f"peft_kernels::{operator}", refuse, lib=lib)


def check_numbers(operator: str, **numbers: float | Tensor | None) -> None:
    """Checks that no number is a tensor that requires a gradient, which it would not get.

    Raises:
        ValueError: a number is such a tensor.
    """
    for name, x in numbers.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{operator}: {name} must be a number, to which no gradient goes, got a tensor that requires a gradient"
            )


def without_autocast(device: str):
    """Disables autocast for the library's matmuls: an operator determines its compute dtype itself."""
    active = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if active else nullcontext()
