"""Operators by name, and the optional modules of each operator's package.

A package ``ops/<package>`` may have these modules, which are imported on demand:

* ``cost``: ``FLOPS``, the matmuls of each dispatcher operator by shapes, for ``torch.utils.flop_counter``;
* ``problems``: ``OPERATORS``, the benchmark of each public operator;
* ``tunable``: ``KERNELS`` and ``targets``, the configs that ``peft-kernels tune`` may change and the calls that it
  times;
* ``variants``: ``variants()``, the Triton kernels as they are launched, and ``CUDA_KERNELS``, for tools/kernel_report.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from .. import ops
from .problem import Operator


@cache
def packages() -> dict[str, tuple[str, ...]]:
    """Returns package -> its public operators, in the order of ``ops.__all__``."""
    names: dict[str, list[str]] = {}
    for name in ops.__all__:
        names.setdefault(getattr(ops, name).__module__.rpartition(".")[2], []).append(name)
    return {package: tuple(operators) for package, operators in names.items()}


def declared(name: str) -> dict[str, ModuleType]:
    """Returns package -> its module ``name``, for the packages that have one."""
    return {
        package: import_module(f".{package}.{name}", __package__)
        for package in packages()
        if find_spec(f"{__package__}.{package}.{name}")
    }


def operator(name: str) -> Operator:
    """Returns the benchmark of the operator ``name``.

    Raises:
        ValueError: ``name`` is not the name of an operator.
    """
    for package, names in packages().items():
        if name in names:
            return import_module(f".{package}.problems", __package__).OPERATORS[name]
    raise ValueError(f"expected an operator, one of {', '.join(ops.__all__)}; got {name!r}")
