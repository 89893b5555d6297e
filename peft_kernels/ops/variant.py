"""A Triton kernel as launched on one architecture, and the properties that its binary must have."""

from typing import Any, NamedTuple

# architecture -> the instruction that multiplies tiles of 64 rows and more
ARCHITECTURES = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def matrix_unit(name: str, exact: bool, rows: int = 64) -> str:
    """Returns the instruction that multiplies tiles of ``rows`` rows.

    ``exact``: in float32, which NVIDIA's tensor cores do not support at full precision; AMD's do.
    """
    if name == "gfx942":
        return "mfma"
    if exact:
        return "fma"
    return ARCHITECTURES[name] if rows >= 64 else "mma"


class Expected(NamedTuple):
    matrix_unit: str | None = None  # None: the kernel has no matmul; "fma": it has one, without tensor cores
    load: int = 16  # lower bound of the widest load, in bytes
    store: int = 1
    widest: int = 32  # upper bound of an access, in bytes: unaligned rows do not allow 16
    warps: int = 1  # lower bound of the warps per SM: a memory-bound kernel needs several blocks


class Variant(NamedTuple):
    """A compiled kernel.

    ``options`` are the kernel's constants and the compiler's options, as the launcher passes them. ``types`` are the
    types of the arguments that are not 32-bit integers; None for an absent argument.
    """

    architecture: str
    operator: str
    kernel: str
    dtype: str
    function: Any  # triton.JITFunction
    options: dict[str, Any]
    types: dict[str, str | None]
    expected: Expected

    @property
    def name(self) -> str:
        constants = {key: value for key, value in self.options.items() if key in self.function.arg_names}
        constants = {key: int(value) if isinstance(value, bool) else value for key, value in constants.items()}
        config = " ".join(f"{key}={value}" for key, value in constants.items())
        kernel = f"{self.architecture} {self.operator} {self.kernel} {self.dtype}"
        return f"{kernel} {config} stages={self.options['num_stages']}"
