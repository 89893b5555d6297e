from ..variant import ARCHITECTURES, Expected, Variant, matrix_unit
from . import triton as implementation
from . import triton_kernels

OPERATOR = "label_cross_attention"
TYPES = {
    **dict.fromkeys(("scores", "weights", "grad_weights"), "*fp32"),
    **dict.fromkeys(("lengths", "offsets"), "*i64"),
}
KERNELS = {
    "scores": triton_kernels.label_cross_attention_scores_kernel,
    "softmax": triton_kernels.label_cross_attention_softmax_kernel,
    "softmax_backward": triton_kernels.label_cross_attention_softmax_bwd_kernel,
    "pool": triton_kernels.label_cross_attention_pool_kernel,
}


def variants():
    """Yields every kernel. mixed: bf16 features, float32 queries; pool_float: the pool of a backward pass, whose result
    is float32.
    """
    for architecture in ARCHITECTURES:
        for kernel in ("softmax", "softmax_backward"):
            function = KERNELS[kernel]
            # a row of weights has any number of queries, so no access is wide
            yield Variant(
                architecture, OPERATOR, kernel, "fp32", function, implementation.SOFTMAX, TYPES, Expected(load=4)
            )
        for dtype in ("fp32", "mixed", "bf16"):
            for unit, queries in implementation.CONFIGS:
                if unit == unit_of(architecture, dtype):
                    kernels = ("scores", "pool", "pool_float") if dtype == "bf16" else ("scores", "pool")
                    yield from (product(architecture, kernel, dtype, queries) for kernel in kernels)
        yield from (product(architecture, kernel, "fp16", 32) for kernel in ("scores", "pool"))


def product(architecture, kernel, dtype, queries):
    unit, exact = unit_of(architecture, dtype), dtype in ("fp32", "mixed")
    features = "*bf16" if dtype == "mixed" else f"*{dtype}"
    of_queries = "*fp32" if exact else f"*{dtype}"
    blackwell = {"BLACKWELL": architecture == "sm_100"}
    types = {
        **TYPES,
        "features": features,
        "queries_of": of_queries,
        "out": "*fp32" if kernel == "pool_float" else of_queries,
    }
    if kernel == "scores":
        options = {**blackwell, **implementation.scores_options(unit, queries)}
    else:
        options = {"WIDE": exact, **blackwell, **implementation.pool_options(unit, queries)}
    # a block of 16 bfloat16 columns per token may give a thread 8 bytes
    expected = Expected(matrix_unit(architecture, exact), load=8 if dtype == "mixed" else 16)
    return Variant(
        architecture, OPERATOR, kernel, dtype, KERNELS[kernel.removesuffix("_float")], options, types, expected
    )


def unit_of(architecture, dtype):
    return "amd" if architecture == "gfx942" else "half" if dtype in ("bf16", "fp16") else "fma"
