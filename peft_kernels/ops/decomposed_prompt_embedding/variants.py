from ..variant import ARCHITECTURES, Expected, Variant, matrix_unit
from . import triton as implementation
from . import triton_kernels

OPERATOR = "decomposed_prompt_embedding"
CUDA_KERNELS = ("decomposed_prompt_embedding_fwd_kernel", "decomposed_prompt_embedding_bwd_kernel")
OTHERS = {
    **dict.fromkeys(("prompt", "a", "b", "delta", "grad_prompt", "grad_delta"), "*fp32"),
    **dict.fromkeys(("input_ids", "offsets", "adapter_ids"), "*i64"),
}  # fmt: skip
WARPS = 12  # three blocks of four warps
KERNELS = {
    "forward": triton_kernels.decomposed_prompt_embedding_fwd_kernel,
    "backward": triton_kernels.decomposed_prompt_embedding_bwd_kernel,
}


def variants():
    """Yields the forward with the matmul of a and b, the forward with delta, and the backward."""
    for architecture in ARCHITECTURES:
        for dtype in ("fp32", "bf16", "fp16"):
            configs = implementation.CONFIGS[
                "amd" if architecture == "gfx942" else "nvidia", 4 if dtype == "fp32" else 2
            ]
            types = {**OTHERS, **dict.fromkeys(("out", "weight", "grad"), f"*{dtype}")}
            for first in (False, True):
                for kernel, absent in (("forward_product", ("delta",)), ("forward_delta", ("a", "b"))):
                    product = kernel == "forward_product"
                    # 16 bits: three TF32 matmuls
                    unit = matrix_unit(architecture, dtype == "fp32", configs.forward.rows) if product else None
                    options = implementation.forward_options(configs.forward, first, product)
                    expected, present = Expected(unit, store=16, warps=WARPS), {**types, **dict.fromkeys(absent)}
                    yield Variant(architecture, OPERATOR, kernel, dtype, KERNELS["forward"], options, present, expected)
                options, expected = implementation.backward_options(configs.backward, first), Expected(warps=WARPS)
                yield Variant(architecture, OPERATOR, "backward", dtype, KERNELS["backward"], options, types, expected)
