"""Compile the operator's Triton kernels for GPUs that are not here, and say what the binaries, and those of CUDA C++, hold.

    python tests/ops/compile_decomposed_prompt_embedding.py [--only "sm_90 bf16"]    one line of JSON for every shipped configuration
    python tests/ops/compile_decomposed_prompt_embedding.py --cuda                   the same of every kernel in the built CUDA library
    python tests/ops/compile_decomposed_prompt_embedding.py --write [--cuda]         the same, into compiled_decomposed_prompt_embedding.json

``--write`` keeps, of every row, the most registers and shared memory of this and the versions of the compiler recorded before; delete
the file first to forget them.

A process of its own: Triton's interpreter, which the other tests set, is chosen when a kernel is decorated.
"""

import argparse
import json
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from compile_shared_cross_attention import CUOBJDUMP, TARGETS, facts  # it takes the interpreter away: first
from triton.compiler import ASTSource

from peft_kernels.ops.decomposed_prompt_embedding import cuda, triton_kernels
from peft_kernels.ops.decomposed_prompt_embedding import triton as implementation

TABLE = Path(__file__).with_name("compiled_decomposed_prompt_embedding.json")
KERNELS = ("product", "delta", "backward")
STORE16 = r"st\.global(?:\.\w+)*\.v4|(?:global|buffer)_store_dwordx4"
FLOATS = ("prompt", "a", "b", "delta", "grad_prompt", "grad_delta")


def cases():
    """(family, dtype, kernel): forward with a and b or with delta, and backward."""
    for family, size in implementation.CONFIGS:
        for dtype in ("fp32",) if size == 4 else ("bf16", "fp16"):
            yield from ((family, dtype, kernel) for kernel in KERNELS)


def compile_one(case) -> tuple[str, dict]:
    family, dtype, kernel = case
    configs = implementation.CONFIGS[family, 4 if dtype == "fp32" else 2]
    if kernel == "backward":
        function, options = triton_kernels.backward_kernel, implementation.backward_options(configs.backward, True)
    else:
        function, options = triton_kernels.forward_kernel, implementation.forward_options(configs.forward, True)
    constants = {key: value for key, value in options.items() if key in function.arg_names}
    options = {key: value for key, value in options.items() if key not in constants}
    constants.update(dict.fromkeys({"product": ("delta",), "delta": ("a", "b"), "backward": ()}[kernel]))
    signature, attrs = {}, {}
    for i, arg in enumerate(function.arg_names):
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg in ("scale", "embed_scale"):
            signature[arg] = "fp32"
        elif arg in ("input_ids", "offsets", "adapter_ids"):
            signature[arg] = "*i64"
        elif arg in ("out", "weight", "grad", *FLOATS):
            signature[arg] = "*fp32" if arg in FLOATS else f"*{dtype}"
        else:
            signature[arg] = "i32"
        if signature[arg].startswith("*") or arg in ("d", "stride_w", "stride_gb", "stride_gl"):
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


def cuda_kernels():
    """(name, row) of every kernel of every architecture in the library that setup.py built."""
    usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cuda.LIBRARY], capture_output=True, text=True, check=True).stdout
    family = None
    for line in usage.splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            family = found[1]
        elif found := re.search(r"embedding_(forward|backward)I(f|6__half|13__nv_bfloat16)((?:Li\d+E)+)E", line):
            dtype = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}[found[2]]
            width, *positions = re.findall(r"\d+", found[3])
            kernel = " ".join((family, dtype, found[1], f"V={width}", *(f"P={p}" for p in positions)))
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            yield kernel, {"registers": registers, "spills": stack + local, "shared": shared}


def write(section: str, version: str, found: dict[str, dict]):
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    before = table.get(section, {"versions": [], "kernels": {}})
    for key, row in found.items():
        for count in ("registers", "shared"):
            row[count] = max(row[count], before["kernels"].get(key, row)[count])
    table[section] = {"versions": sorted({*before["versions"], version}), "kernels": found}
    sections = []
    for name, content in sorted(table.items()):
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in content["kernels"].items())
        sections.append(f'"{name}": {{"versions": {json.dumps(content["versions"])}, "kernels": {{\n{rows}\n}}}}')
    TABLE.write_text("{" + ",\n".join(sections) + "}\n")


def triton_version() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def cuda_version() -> str:
    """Of the compiler that built the library."""
    headers = subprocess.run(["readelf", "-p", ".comment", cuda.LIBRARY], capture_output=True, text=True)
    return headers.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", type=int, default=2, help="processes")
    parser.add_argument("--only", default="", help="a regular expression on the name")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = {}
    with ProcessPoolExecutor(options.j) as pool:
        rows = cuda_kernels() if options.cuda else pool.map(compile_one, [case for case in cases() if re.search(options.only, " ".join(case))])
        for key, row in rows:
            print(json.dumps({key: row}), flush=True)
            found[key] = row
    if options.write:
        write(*(("cuda", cuda_version()) if options.cuda else ("triton", triton_version())), found)


if __name__ == "__main__":
    main()
