"""Compile the Triton kernels of label_logits, prototype_scores and label_cross_attention for GPUs that are not here, and say what the
binaries hold.

    python tests/ops/compile_labels.py [--only "sm_90 bf16"]    one line of JSON for every shipped configuration
    python tests/ops/compile_labels.py --write                  the same, into compiled_labels.json; see compile_decomposed_prompt_embedding.py
"""

import re
from pathlib import Path

import triton
from compile_decomposed_prompt_embedding import STORE16, TARGETS, facts, main  # it takes the interpreter away: first
from triton.compiler import ASTSource

from peft_kernels.ops.label_cross_attention import triton as attention
from peft_kernels.ops.label_logits import triton as logits
from peft_kernels.ops.prototype_scores import triton as prototypes

TABLE = Path(__file__).with_name("compiled_labels.json")
IN_STORAGE = ("hidden", "weight", "bias", "features")
INTEGERS = dict.fromkeys(("label_ids", "positions", "labels", "lengths", "offsets"), "*i64")
ALIGNED = ("d", "stride_hb", "stride_hs", "stride_wv", "stride_qh", "stride_qb", "stride_fb", "stride_fn", "stride_oh", "stride_op")


def cases():
    """(family, dtype of the features, kernel, size): words, columns or queries to a block.

    mixed: bf16 features, float32 queries; pool_float: the pool of a backward pass, whose result is float32.
    """
    for family in TARGETS:
        for dtype in ("fp32", "bf16"):
            yield from ((family, dtype, "logits_forward", str(config.words)) for config in logits.FORWARD)
            yield family, dtype, "logits_backward", str(logits.BACKWARD.words)
        yield from ((family, "fp32", f"prototypes_{kernel}", "128") for kernel in ("forward", "backward", "prototypes", "cross_entropy"))
        yield family, "fp32", "prototypes_cross_entropy", "8192"  # it has most to keep
        yield from ((family, "fp32", kernel, "any") for kernel in ("softmax", "softmax_backward"))
        for dtype in ("fp32", "mixed", "bf16"):
            sizes = [size for unit, size in attention.CONFIGS if unit == unit_of(family, dtype)]
            yield from ((family, dtype, kernel, str(size)) for size in sizes for kernel in ("scores", "pool"))
        yield family, "bf16", "pool_float", "64"
        yield from ((family, "fp16", kernel, "32") for kernel in ("scores", "pool"))


def unit_of(family, dtype):
    return "amd" if family == "gfx942" else "half" if dtype in ("bf16", "fp16") else "fma"


def launch(family, dtype, kernel, size):
    """The kernel and its options."""
    if kernel.startswith("logits"):
        config = logits.BACKWARD if kernel == "logits_backward" else logits.forward_config(int(size))
        return getattr(logits.triton_kernels, kernel[7:] + "_kernel"), logits.launch_options(config)
    if kernel.startswith("prototypes_"):
        return getattr(prototypes.triton_kernels, kernel[11:] + "_kernel"), prototypes.row_options(int(size))
    if kernel.startswith("softmax"):
        return getattr(attention.triton_kernels, kernel + "_kernel"), attention.SOFTMAX
    if kernel == "scores":
        return attention.triton_kernels.scores_kernel, attention.scores_options(unit_of(family, dtype), int(size))
    return attention.triton_kernels.pool_kernel, {"WIDE": dtype in ("fp32", "mixed"), **attention.pool_options(unit_of(family, dtype), int(size))}


def pointer(dtype, kernel, arg):
    storage = "bf16" if dtype == "mixed" else dtype
    if kernel.startswith("logits") or arg == "features":
        return f"*{storage}" if arg in IN_STORAGE else INTEGERS.get(arg, "*fp32")
    of_queries = arg == "queries_of" or (arg == "out" and kernel == "pool")
    return f"*{dtype}" if of_queries and dtype != "mixed" else INTEGERS.get(arg, "*fp32")


def compile_one(case) -> tuple[str, dict]:
    family, dtype, kernel, _ = case
    function, options = launch(*case)
    constants = {key: value for key, value in options.items() if key in function.arg_names}
    options = {key: value for key, value in options.items() if key not in constants}
    constants.update({arg: 1 for arg in ("stride_hd", "stride_wd") if arg in function.arg_names})
    signature, attrs = {}, {}
    for i, arg in enumerate(function.arg_names):
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg == "scale" or (arg == "weight" and kernel.startswith("prototypes")):
            signature[arg] = "fp32"
        elif arg.startswith("stride") or arg in ("words", "d", "texts", "rows", "classes", "n", "batch", "slots", "queries"):
            signature[arg] = "i32"
        else:
            signature[arg] = pointer(dtype, kernel, arg)
        if signature[arg].startswith("*") or arg in ALIGNED:
            attrs[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
    try:
        binary = triton.compile(source, target=TARGETS[family], options=options)
    except Exception as error:
        return " ".join(case), {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    row = facts(binary)
    if re.search(STORE16, binary.asm.get("ptx") or binary.asm["amdgcn"]):
        row["instructions"].append("store16")
    return " ".join(case), row


if __name__ == "__main__":
    main(__doc__, TABLE, cases, compile_one, None)
