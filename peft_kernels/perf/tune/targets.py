"""Calls that ``peft-kernels tune`` times: for every row of every default config table, one that spends much of its time
in that row's kernel.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from ...ops.problem import Setting, Sizes
from ...ops.registry import declared
from ...ops.tuned import Site

LARGE = Sizes()


class Target(NamedTuple):
    """``make()`` returns a call on fresh inputs, the same every time.

    The call returns tensors, some of which may be None.
    """

    site: Site
    default: dict[str, Any]
    dtype: torch.dtype
    make: Callable[[], Callable[[], tuple]]


def targets(operator: str, dtype: torch.dtype, device: torch.device, sizes: Sizes = LARGE) -> Iterator[Target]:
    """The targets of one package of operators. Targets that depend on no dtype belong to float32."""
    setting = Setting(dtype, device, sizes)
    for kernel, key, default, make in declared("tunable")[operator].targets(setting):
        yield Target(Site(operator, kernel, key), default, dtype, partial(make, setting))
