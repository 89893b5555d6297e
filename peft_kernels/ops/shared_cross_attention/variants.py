from ..variant import Expected, Variant, matrix_unit
from . import triton as implementation
from . import triton_backward, triton_forward

OPERATOR = "shared_cross_attention"
IN_STORAGE = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
OTHERS = {
    **dict.fromkeys(("lse", "delta", "grad_lse", "partial_out", "partial_lse"), "*fp32"),
    "key_lengths": "*i64", "cu_streams": "*i32",
}  # fmt: skip
KERNELS = {
    **dict.fromkeys(("attend", "attend_split"), triton_forward.shared_cross_attention_fwd_kernel),
    "merge": triton_forward.shared_cross_attention_fwd_merge_kernel,
    "delta": triton_backward.shared_cross_attention_bwd_delta_kernel,
    "query_grad": triton_backward.shared_cross_attention_bwd_query_kernel,
    **dict.fromkeys(
        ("key_grad", "value_grad", "key_value_grad"), triton_backward.shared_cross_attention_bwd_key_value_kernel
    ),
}


def variants():
    """Yields every row of the table, and D = 80 with the row of 128. attend_split: the keys are split, and the partial
    results are float32.
    """
    for (architecture, size, block_d), configs in implementation.CONFIGS.items():
        for d in (80, 128) if (size, block_d) == (2, 128) else (block_d,):
            dtype = "fp32" if size == 4 else "fp16" if d == 80 else "bf16"
            grads = ("key_grad", "value_grad") if configs.apart else ("key_value_grad",)
            attends = ("attend",) if dtype == "fp32" else ("attend", "attend_split")
            for kernel in attends:
                yield from (products(architecture, kernel, dtype, d, config) for config in configs.forward)
            yield products(architecture, "query_grad", dtype, d, configs.query_grad)
            yield from (products(architecture, kernel, dtype, d, configs.key_value_grad) for kernel in grads)
            if d != 80:
                yield from (rows(architecture, kernel, dtype, d) for kernel in ("merge", "delta"))


def products(architecture, kernel, dtype, d, config):
    types = types_of(dtype)
    if kernel == "attend_split":
        types["out"] = "*fp32"
    tall = config.rows if kernel.startswith("attend") else 64  # scores are transposed if the block of rows is short
    types |= {"key_grad": {"grad_v": None}, "value_grad": {"grad_k": None}}.get(kernel, {})
    options = implementation.launch_options(config, architecture, 4 if dtype == "fp32" else 2, d)
    return Variant(
        architecture,
        OPERATOR,
        kernel,
        dtype,
        KERNELS[kernel],
        options,
        types,
        Expected(matrix_unit(architecture, dtype == "fp32", tall)),
    )


def rows(architecture, kernel, dtype, d):
    # an AMD wavefront has twice as many threads, so each thread has half as many columns
    load = 8 if architecture == "gfx942" and d == 64 and dtype != "fp32" else 16
    return Variant(
        architecture,
        OPERATOR,
        kernel,
        dtype,
        KERNELS[kernel],
        implementation.row_options(d),
        types_of(dtype),
        Expected(load=load),
    )


def types_of(dtype):
    return {**OTHERS, **dict.fromkeys(IN_STORAGE, f"*{dtype}")}
