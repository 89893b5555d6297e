"""A Triton kernel as it is launched on one architecture, and what its binary must hold, whatever the compiler."""

from typing import Any, NamedTuple

# architecture -> the instruction that multiplies tiles of 64 rows and more
ARCHITECTURES = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def matrix_unit(name: str, exact: bool, rows: int = 64) -> str:
    """The instruction that multiplies tiles of ``rows`` rows.

    ``exact``: in float32, for which NVIDIA's tensor cores are too coarse; AMD's are not.
    """
    if name == "gfx942":
        return "mfma"
    if exact:
        return "fma"
    return ARCHITECTURES[name] if rows >= 64 else "mma"


class Expected(NamedTuple):
    matrix_unit: str | None = None  # None: it multiplies no matrices; "fma": it does, without tensor cores
    load: int = 16  # bytes of its widest load, at least
    store: int = 1
    widest: int = 32  # bytes of an access, at most: rows of any alignment take no 16
    warps: int = 1  # of an SM, at least: a kernel that waits for memory wants several blocks


class Variant(NamedTuple):
    """``options``: constants of the kernel and options of the compiler, as the launcher gives them. ``types``: of the arguments that are
    not 32-bit integers, None for one that is absent.
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
        values = {key: value for key, value in self.options.items() if key in self.function.arg_names}
        configuration = " ".join(f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in values.items())
        return f"{self.architecture} {self.operator} {self.kernel} {self.dtype} {configuration} stages={self.options['num_stages']}"
