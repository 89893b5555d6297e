from ..variant import ARCHITECTURES, Expected, Variant
from . import triton as implementation
from . import triton_kernels

OPERATOR = "special_tokens"
CUDA_KERNELS = ("special_token_slots_kernel", "special_token_add_kernel", "special_token_add_bwd_kernel")
WARPS = 12
TYPES = {
    **dict.fromkeys(("input_ids", "special_ids", "attention_mask", "adapter_ids", "seed"), "*i64"),
    **dict.fromkeys(("slots", "counts"), "*i32"),
    **dict.fromkeys(("vectors", "partial"), "*fp32"),
}
KERNELS = {
    "slots": triton_kernels.special_token_slots_kernel,
    "add": triton_kernels.special_token_add_kernel,
    "backward": triton_kernels.special_token_add_bwd_kernel,
}


def variants():
    for architecture in ARCHITECTURES:
        short = Expected(load=1, warps=WARPS)
        yield Variant(
            architecture, OPERATOR, "slots", "int64", KERNELS["slots"], implementation.slots_options(), TYPES, short
        )
        for dtype, size in (("fp32", 4), ("bf16", 2)):
            types = {**TYPES, **dict.fromkeys(("hidden", "grad"), f"*{dtype}")}
            # an AMD wavefront has twice as many threads, so each thread has half as many columns
            add = (
                Expected(load=8, store=4, warps=WARPS) if architecture == "gfx942" else Expected(store=16, warps=WARPS)
            )
            yield Variant(
                architecture, OPERATOR, "add", dtype, KERNELS["add"], implementation.add_options(size), types, add
            )
            options = implementation.backward_options(size, False)
            yield Variant(
                architecture, OPERATOR, "backward", dtype, KERNELS["backward"], options, types, Expected(warps=WARPS)
            )
        options, types = implementation.backward_options(4, True), {**TYPES, "grad": "*fp32"}
        yield Variant(
            architecture, OPERATOR, "backward", "fp32", KERNELS["backward"], options, types, Expected(warps=WARPS)
        )
