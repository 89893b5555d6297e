"""Compile the operator's Triton kernels for GPUs that are not here, and say what the binaries, and those of CUDA C++, hold.

The first line is the compiler's version.

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

from peft_kernels.ops.cuda_library import LIBRARY
from peft_kernels.ops.decomposed_prompt_embedding import triton as implementation
from peft_kernels.ops.decomposed_prompt_embedding import triton_kernels

TABLE = Path(__file__).with_name("compiled_decomposed_prompt_embedding.json")
KERNELS = ("product", "delta", "backward")
CUDA_KERNELS = "embedding_(forward|backward)"
SASS = {"load16": r"LDG\S*\.128", "store16": r"STG\S*\.128"}
STORE16 = r"st\.global(?:\.\w+)*\.v4|(?:global|buffer)_store_dwordx4"
FLOATS = ("prompt", "a", "b", "delta", "grad_prompt", "grad_delta")


def cases():
    """(family, dtype, kernel): forward with a and b or with delta, and backward."""
    for family in TARGETS:
        for dtype in ("fp32", "bf16", "fp16"):
            yield from ((family, dtype, kernel) for kernel in KERNELS)


def compile_one(case) -> tuple[str, dict]:
    family, dtype, kernel = case
    configs = implementation.CONFIGS["nvidia" if family.startswith("sm") else "amd", 4 if dtype == "fp32" else 2]
    if kernel == "backward":
        function, options = triton_kernels.backward_kernel, implementation.backward_options(configs.backward, True)
    else:
        function, options = triton_kernels.forward_kernel, implementation.forward_options(configs.forward, True, kernel == "product")
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


def cuda_kernels(names: str):
    """(name, row) of the kernels called so, of every architecture, in the library that setup.py built."""
    code = {}
    for family, symbol, text in _sections(_cuobjdump("-sass"), r"arch = (sm_\d+)", r"Function : (\S+)"):
        code[family, symbol] = [key for key, pattern in SASS.items() if re.search(pattern, text)]
    for family, symbol, text in _sections(_cuobjdump("--dump-resource-usage"), r"arch = (sm_\d+)", r"Function (\S+):"):
        if not (found := re.search(rf"\d{names}(?:E|I(f|6__half|13__nv_bfloat16)((?:Li\d+E)+)E)", symbol)):
            continue
        kernel, storage, constants = found.groups("")
        dtype = {"f": ["fp32"], "6__half": ["fp16"], "13__nv_bfloat16": ["bf16"], "": []}[storage]
        name = " ".join((family, *dtype, kernel, *map("{}={}".format, "VP", re.findall(r"\d+", constants))))
        registers, stack, shared, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text).groups())
        yield name, {"registers": registers, "spills": stack + local, "shared": shared, "instructions": code[family, symbol]}


def _cuobjdump(option: str) -> str:
    return subprocess.run([CUOBJDUMP, option, LIBRARY], capture_output=True, text=True, check=True).stdout


def _sections(text: str, *headings: str):
    """What the headings of the current and of the outer level say, and the text below."""
    outer, inner = headings
    for family, below in zip(*[iter(re.split(outer, text)[1:])] * 2):
        for symbol, content in zip(*[iter(re.split(inner, below)[1:])] * 2):
            yield family, symbol, content


def write(path: Path, section: str, version: str, found: dict[str, dict]):
    table = json.loads(path.read_text()) if path.exists() else {}
    before = table.get(section, {"versions": [], "kernels": {}})
    for key, row in found.items():
        for count in ("registers", "shared"):
            row[count] = max(row[count], before["kernels"].get(key, row)[count])
    table[section] = {"versions": sorted({*before["versions"], version}), "kernels": found}
    sections = []
    for name, content in sorted(table.items()):
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in content["kernels"].items())
        sections.append(f'"{name}": {{"versions": {json.dumps(content["versions"])}, "kernels": {{\n{rows}\n}}}}')
    path.write_text("{" + ",\n".join(sections) + "}\n")


def cuda_version() -> str:
    """Of the compiler that built the library."""
    found = re.search(rb"Cuda compilation tools, release ([0-9.]+)", LIBRARY.read_bytes())
    return found[1].decode() if found else "unknown"


def main(description, table, cases, compile_one, cuda_names):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", type=int, default=2, help="processes")
    parser.add_argument("--only", default="", help="a regular expression on the name")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    version = cuda_version() if options.cuda else ".".join(triton.__version__.split(".")[:2])
    print(version)
    found = {}
    with ProcessPoolExecutor(options.j) as pool:
        chosen = [case for case in cases() if re.search(options.only, " ".join(case))]
        rows = cuda_kernels(cuda_names) if options.cuda else pool.map(compile_one, chosen)
        for key, row in rows:
            print(json.dumps({key: row}), flush=True)
            found[key] = row
    if options.write:
        write(table, "cuda" if options.cuda else "triton", version, found)


if __name__ == "__main__":
    main(__doc__, TABLE, cases, compile_one, CUDA_KERNELS)
