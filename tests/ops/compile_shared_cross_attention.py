"""Compile the operator's Triton kernels for GPUs that are not here, and say what the binaries hold.

    python tests/ops/compile_shared_cross_attention.py [--only "sm_90 bf16"]    one line of JSON for every shipped configuration
    python tests/ops/compile_shared_cross_attention.py --write                  the same, into compiled_shared_cross_attention.json

``--write`` keeps, of every row, the most registers and shared memory of this and the versions of Triton recorded before; delete the
file first to forget them.

A process of its own: Triton's interpreter, which the other tests set, is chosen when a kernel is decorated.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_kernels.ops.shared_cross_attention import triton as implementation
from peft_kernels.ops.shared_cross_attention import triton_backward, triton_forward

TABLE = Path(__file__).with_name("compiled_shared_cross_attention.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"mma\.sync", "mfma": r"v_mfma",
    "load16": r"cp\.async\.cg\.shared\.global .*, 0x10|ld\.global(?:\.\w+)*\.v4|(?:global|buffer)_load_dwordx4",
}  # fmt: skip
POINTERS = {
    "lse": "*fp32",
    "delta": "*fp32",
    "grad_lse": "*fp32",
    "partial_out": "*fp32",
    "partial_lse": "*fp32",
    "key_lengths": "*i64",
    "cu_streams": "*i32",
}


def cases():
    """(family, kernel, dtype, D, config) for every row of the table, and D 80 in the row of 128."""
    for (family, size, block_d), configs in implementation.CONFIGS.items():
        for d in (80, 128) if (size, block_d) == (2, 128) else (block_d,):
            dtype = "fp32" if size == 4 else "fp16" if d == 80 else "bf16"
            grads = ("key_grad", "value_grad") if configs.apart else ("key_value_grad",)
            yield from ((family, "attend", dtype, d, config) for config in configs.forward)
            yield family, "query_grad", dtype, d, configs.query_grad
            yield from ((family, kernel, dtype, d, configs.key_value_grad) for kernel in grads)
            if block_d == 128 and d != 80:
                yield from ((family, kernel, dtype, d, None) for kernel in ("merge", "delta"))


def name(family, kernel, dtype, d, config):
    return f"{family} {dtype} D={d} {kernel} {config.rows}x{config.keys}" if config else f"{family} {dtype} D={d} {kernel}"


def compile_one(case) -> tuple[str, dict]:
    family, kernel, dtype, d, config = case
    absent = {"key_grad": "grad_v", "value_grad": "grad_k"}.get(kernel)
    if absent:
        kernel = "key_value_grad"
    function = getattr(triton_forward if kernel in ("attend", "merge") else triton_backward, f"{kernel}_kernel")
    size = 4 if dtype == "fp32" else 2
    options = implementation.launch_options(config, family, size, d) if config else implementation.row_options(d)
    constants = {key: value for key, value in options.items() if key in function.arg_names}
    options = {key: value for key, value in options.items() if key not in constants}
    if absent:
        constants[absent] = None
    signature, attrs = {}, {}
    for i, arg in enumerate(function.arg_names):
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg == "scale":
            signature[arg] = "fp32"
        elif arg in POINTERS:
            signature[arg] = POINTERS[arg]
        elif arg in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"):
            partial = kernel == "attend" and arg == "out" and config.rows <= 32
            signature[arg] = "*fp32" if partial else f"*{dtype}"
        else:
            signature[arg] = "i32"
        if signature[arg].startswith("*") or arg.startswith("stride"):
            attrs[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
    try:
        return name(*case), facts(triton.compile(source, target=TARGETS[family], options=options))
    except Exception as error:
        return name(*case), {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def facts(binary) -> dict:
    text = binary.asm.get("ptx") or binary.asm["amdgcn"]
    if "cubin" in binary.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(re.search(f"{key}:(\\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        spills = stack + local
    else:
        registers, spills, private = (
            int(re.search(rf"\.{key}: +(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        spills += private  # scalars spill into vector registers, not into memory
    instructions = [key for key, pattern in INSTRUCTIONS.items() if re.search(pattern, text)]
    return {"registers": registers, "spills": spills, "shared": binary.metadata.shared, "instructions": instructions}


def write(found: dict[str, dict]):
    version = ".".join(triton.__version__.split(".")[:2])
    before = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": [], "kernels": {}}
    for key, row in found.items():
        for count in ("registers", "shared"):
            row[count] = max(row[count], before["kernels"].get(key, row)[count])
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in found.items())
    versions = json.dumps(sorted({*before["triton"], version}))
    TABLE.write_text(f'{{"triton": {versions}, "kernels": {{\n{rows}\n}}}}\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", type=int, default=2, help="processes")
    parser.add_argument("--only", default="", help="a regular expression on the name")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = {}
    with ProcessPoolExecutor(options.j) as pool:
        for key, row in pool.map(compile_one, [case for case in cases() if re.search(options.only, name(*case))]):
            print(json.dumps({key: row}), flush=True)
            found[key] = row
    if options.write:
        write(found)


if __name__ == "__main__":
    main()
