from itertools import product

from ..variant import ARCHITECTURES, Expected, Variant
from . import triton as implementation
from . import triton_kernels

OPERATOR = "add_layer_norm_inject"
CUDA_KERNELS = ("add_layer_norm_inject_fwd_kernel", "add_layer_norm_inject_bwd_kernel")
WIDTHS = (1024, 8192)  # four warps and sixteen; in between, a thread has as many elements
EXPECTED = Expected(store=16, warps=12)
OTHERS = {
    **dict.fromkeys(("adapter_ids", "seed"), "*i64"),
    **dict.fromkeys(("vectors", "mean", "rstd", "weight", "bias", "grad_slots"), "*fp32"),
    "slots": "*i32",
}
IN_STORAGE = ("out", "total", "x", "residual", "grad", "grad_x", "grad_sum")
KERNELS = {
    "forward": triton_kernels.add_layer_norm_inject_fwd_kernel,
    "backward": triton_kernels.add_layer_norm_inject_bwd_kernel,
}


def variants():
    """Yields forward and backward with every optional argument."""
    for architecture in ARCHITECTURES:
        for dtype in ("fp32", "bf16"):
            types = {**OTHERS, **dict.fromkeys(IN_STORAGE, f"*{dtype}")}
            for width, rms, pre in product(WIDTHS, (False, True), (False, True)):
                options = {"RMS": rms, "PRE": pre, **implementation.row_options(width)}
                yield Variant(architecture, OPERATOR, "forward", dtype, KERNELS["forward"], options, types, EXPECTED)
            for width, listed in product(WIDTHS, (False, True)):
                options = {"LISTED": listed, **implementation.row_options(width)}
                yield Variant(architecture, OPERATOR, "backward", dtype, KERNELS["backward"], options, types, EXPECTED)
