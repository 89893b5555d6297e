from itertools import product

from ..variant import ARCHITECTURES, Expected, Variant
from . import triton as implementation
from . import triton_kernels

OPERATOR = "prototype_scores"
FLOATS = ("out", "grad_projected", "grad", "projected", "prototypes", "partial", "radius", "scores", "losses")
TYPES = {**dict.fromkeys(FLOATS, "*fp32"), "labels": "*i64", "weight": "fp32"}
WIDTHS = (128, 8192)  # one warp and sixteen; in between, a thread has as many elements
KERNELS = {
    "forward": triton_kernels.prototype_scores_fwd_kernel,
    "backward": triton_kernels.prototype_scores_bwd_kernel,
    "prototypes": triton_kernels.prototype_scores_bwd_prototypes_kernel,
    "cross_entropy": triton_kernels.prototype_cross_entropy_fwd_kernel,
}


def variants():
    for architecture, (kernel, function), width in product(ARCHITECTURES, KERNELS.items(), WIDTHS):
        options = implementation.row_options(width)
        yield Variant(architecture, OPERATOR, kernel, "fp32", function, options, TYPES, Expected())
