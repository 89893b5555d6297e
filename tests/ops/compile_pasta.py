"""Compile the Triton kernels of special_tokens and add_layer_norm_inject for GPUs that are not here, and say what the binaries, and those
of CUDA C++, hold.

    python tests/ops/compile_pasta.py [--only "sm_90 bf16"]    one line of JSON for every shipped configuration
    python tests/ops/compile_pasta.py --cuda                   the same of every kernel in the built CUDA library
    python tests/ops/compile_pasta.py --write [--cuda]         the same, into compiled_pasta.json; see compile_decomposed_prompt_embedding.py
"""

import re
from pathlib import Path

import triton
from compile_decomposed_prompt_embedding import STORE16, TARGETS, facts, main  # it takes the interpreter away: first
from triton.compiler import ASTSource

from peft_kernels.ops.add_layer_norm_inject import triton as norm
from peft_kernels.ops.special_tokens import triton as special_tokens

TABLE = Path(__file__).with_name("compiled_pasta.json")
CUDA_KERNELS = "(special_token_(?:slots|add(?:_backward)?)|add_layer_norm_inject(?:_backward)?)"
ALWAYS_FLOAT = ("vectors", "partial", "mean", "rstd", "weight", "bias", "grad_slots")
IN_STORAGE = ("hidden", "grad", "out", "total", "x", "residual", "grad_x", "grad_sum")
INTEGERS = {**dict.fromkeys(("input_ids", "special_ids", "attention_mask", "adapter_ids", "seed"), "*i64"), "slots": "*i32", "counts": "*i32"}
ALIGNED = ("d", "stride_hb", "stride_hs", "stride_gb", "stride_gs", "stride_xb", "stride_xs", "stride_rb", "stride_rs", "stride_tb", "stride_ts")


def cases():
    """(family, dtype, kernel, columns): forward and backward of the norm, with everything they can have, in blocks of these columns."""
    for family in TARGETS:
        yield family, "fp32", "slots", "any"
        yield family, "fp32", "vectors_by_slot", "any"
        for dtype in ("fp32", "bf16"):
            yield from ((family, dtype, kernel, "any") for kernel in ("add", "vectors"))
            yield from ((family, dtype, kernel, columns) for kernel in ("forward", "backward") for columns in ("1024", "8192"))
            yield family, dtype, "forward_pre", "1024"


def launch(dtype, kernel, columns):
    """The kernel and its options."""
    size = 4 if dtype == "fp32" else 2
    if kernel == "slots":
        return special_tokens.triton_kernels.slots_kernel, special_tokens.slots_options()
    if kernel == "add":
        return special_tokens.triton_kernels.add_kernel, special_tokens.add_options(size)
    if kernel.startswith("vectors"):
        return special_tokens.triton_kernels.backward_kernel, special_tokens.backward_options(size, kernel != "vectors")
    if kernel == "backward":
        return norm.triton_kernels.backward_kernel, {"LISTED": False, **norm.row_options(int(columns))}
    options = norm.row_options(int(columns))
    return norm.triton_kernels.forward_kernel, {"RMS": False, "PRE": kernel == "forward_pre", **options}


def compile_one(case) -> tuple[str, dict]:
    family, dtype, kernel, columns = case
    function, options = launch(dtype, kernel, columns)
    constants = {key: value for key, value in options.items() if key in function.arg_names}
    options = {key: value for key, value in options.items() if key not in constants}
    if "stride_hd" in function.arg_names:
        constants["stride_hd"] = 1
    signature, attrs = {}, {}
    for i, arg in enumerate(function.arg_names):
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg in ("scale", "eps"):
            signature[arg] = "fp32"
        elif arg in IN_STORAGE:
            signature[arg] = "*fp32" if kernel == "vectors_by_slot" else f"*{dtype}"
        else:
            signature[arg] = "*fp32" if arg in ALWAYS_FLOAT else INTEGERS.get(arg, "i32")
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
    main(__doc__, TABLE, cases, compile_one, CUDA_KERNELS)
