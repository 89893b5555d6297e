from ..variant import ARCHITECTURES, Expected, Variant
from . import triton as implementation
from . import triton_kernels

OPERATOR = "prototype_scores"
FLOATS = ("out", "grad_projected", "grad", "projected", "prototypes", "partial", "radius", "scores", "losses")
TYPES = {**dict.fromkeys(FLOATS, "*fp32"), "labels": "*i64", "weight": "fp32"}
WIDTH = 128
WIDE = 8192
KERNELS = {
    "forward": triton_kernels.prototype_scores_fwd_kernel,
    "backward": triton_kernels.prototype_scores_bwd_kernel,
    "prototypes": triton_kernels.prototype_scores_bwd_prototypes_kernel,
    "cross_entropy": triton_kernels.prototype_cross_entropy_fwd_kernel,
}


def variants():
    """Yields every kernel, and the loss with wide rows as well, since it needs the most registers."""
    for architecture in ARCHITECTURES:
        kernels = [(kernel, WIDTH) for kernel in ("forward", "backward", "prototypes", "cross_entropy")]
        for kernel, width in (*kernels, ("cross_entropy", WIDE)):
            function = KERNELS[kernel]
            yield Variant(
                architecture, OPERATOR, kernel, "fp32", function, implementation.row_options(width), TYPES, Expected()
            )
