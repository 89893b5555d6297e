from ..variant import ARCHITECTURES, Expected, Variant
from . import triton as implementation
from . import triton_kernels

OPERATOR = "label_logits"
OTHERS = {
    **dict.fromkeys(("out", "grad_rows", "grad_words"), "*fp32"),
    **dict.fromkeys(("label_ids", "positions"), "*i64"),
}
KERNELS = {
    "forward": triton_kernels.label_logits_fwd_kernel,
    "backward": triton_kernels.label_logits_bwd_kernel,
}


def variants():
    for architecture in ARCHITECTURES:
        for dtype in ("fp32", "bf16"):
            types = {**OTHERS, **dict.fromkeys(("hidden", "weight", "bias"), f"*{dtype}")}
            for kernel, configs in (("forward", implementation.FORWARD), ("backward", (implementation.BACKWARD,))):
                function = KERNELS[kernel]
                for config in configs:
                    yield Variant(
                        architecture,
                        OPERATOR,
                        kernel,
                        dtype,
                        function,
                        implementation.launch_options(config),
                        types,
                        Expected(),
                    )
