"""The resources and instructions of a binary: one compiled by Triton, or the kernels of the CUDA C++ library."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from peft_kernels.ops.cuda_library import LIBRARY

from .architectures import ARCHITECTURES

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MATRIX_UNITS = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"mma\.sync", "mfma": r"v_mfma"}
PTX = {"load": r"\bld\.global([.:\w]*)", "store": r"\bst\.global([.:\w]*)"}
PTX_COPY = r"\bcp\.async\.c[ag]\.shared\.global .*?, 0x(\d+)"  # 4, 8 or 10, hexadecimal
AMDGCN = {"load": r"\b(?:global|buffer|flat)_load_(\w+)", "store": r"\b(?:global|buffer|flat)_store_(\w+)"}
AMDGCN_BYTES = {
    "byte": 1,
    "ubyte": 1,
    "sbyte": 1,
    "short": 2,
    "ushort": 2,
    "sshort": 2,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
}
SASS_MATRIX_UNIT = r"\b(?:[DHIQ]G?MMA|UTC\w*MMA)\b"
SASS = {"load": r"\bLDG?(?:STS)?\.E([.\w]*)", "store": r"\bSTG?\.E([.\w]*)"}
RESOURCES = r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
DTYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16", "": "any"}


def of_triton(binary) -> dict:
    metadata = binary.metadata
    row = {"tensor_memory": getattr(metadata, "tmem_size", None) or 0, "warps": metadata.num_warps}
    if "cubin" in binary.asm:
        text = binary.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            registers, stack, _, local = map(
                int, re.search(RESOURCES, _cuobjdump("--dump-resource-usage", file.name)).groups()
            )
        scalars, spills = 0, stack + local
        widths = {key: _widest(map(_ptx_bytes, re.findall(pattern, text))) for key, pattern in PTX.items()}
        widths["load"] = max(widths["load"], _widest(int(size, 16) for size in re.findall(PTX_COPY, text)))
    else:
        text = binary.asm["amdgcn"]
        registers, scalars, spills, private = (
            int(re.search(rf"\.{key}: +(\d+)", text)[1])
            for key in ("vgpr_count", "sgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        spills += private  # spilled scalars go to vector registers, not to memory
        widths = {key: _widest(map(_amdgcn_bytes, re.findall(pattern, text))) for key, pattern in AMDGCN.items()}
    # two units: one matmul of the kernel fell back
    units = [key for key, pattern in MATRIX_UNITS.items() if re.search(pattern, text)]
    unit = "+".join(units) or ("fma" if "tt.dot " in binary.asm["ttgir"] else None)
    return {
        "registers": registers,
        "scalars": scalars,
        "spills": spills,
        "shared": metadata.shared,
        **row,
        "matrix_unit": unit,
        **widths,
    }


def of_cuda_library(operators: dict[str, str]):
    """Yield (architecture, operator, kernel, dtype, constants, row) of every kernel that belongs to a named
    operator.
    """
    threads = {
        (architecture, symbol): int(match[1], 16)
        for architecture, symbol, text in _sections(_cuobjdump("-elf", LIBRARY), r"\.nv\.info\.(\S+)")
        if (match := re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+0x(\w+)", text))
    }
    code = {
        (architecture, symbol): {
            "matrix_unit": "mma" if re.search(SASS_MATRIX_UNIT, text) else None,
            **{key: _widest(map(_sass_bytes, re.findall(pattern, text))) for key, pattern in SASS.items()},
        }
        for architecture, symbol, text in _sections(_cuobjdump("-sass", LIBRARY), r"Function : (\S+)")
    }
    kernels = "|".join(sorted(operators, key=len, reverse=True))
    for architecture, symbol, text in _sections(_cuobjdump("--dump-resource-usage", LIBRARY), r"Function (\S+):"):
        if not (match := re.search(rf"\d({kernels})(?:E|I(f|6__half|13__nv_bfloat16)((?:Li\d+E)+)E)", symbol)):
            continue
        kernel, storage, constants = match.groups("")
        registers, stack, shared, local = map(int, re.search(RESOURCES, text).groups())
        if shared and architecture != "sm_80":
            shared -= ARCHITECTURES[architecture].shared_reserved  # from sm_90 on the compiler includes it
        row = {"registers": registers, "scalars": 0, "spills": stack + local, "shared": shared, "tensor_memory": 0}
        row |= {"warps": threads[architecture, symbol] // 32, **code[architecture, symbol]}
        yield architecture, operators[kernel], kernel, DTYPES[storage], re.findall(r"\d+", constants), row


def cuda_version() -> str:
    """The version of the compiler that built the library."""
    match = re.search(rb"Cuda compilation tools, release ([0-9.]+)", LIBRARY.read_bytes())
    return match[1].decode() if match else "unknown"


def _cuobjdump(option: str, file) -> str:
    return subprocess.run([CUOBJDUMP, option, file], capture_output=True, text=True, check=True).stdout


def _sections(text: str, heading: str):
    """Yield the architecture, the heading's match, and the text below it."""
    for architecture, below in zip(*[iter(re.split(r"arch = (sm_\d+)", text)[1:])] * 2):
        for symbol, content in zip(*[iter(re.split(heading, below)[1:])] * 2):
            yield architecture, symbol, content


def _widest(sizes) -> int:
    return max(sizes, default=0)


def _ptx_bytes(modifiers: str) -> int:
    """Bytes of modifiers such as .v4.b32."""
    vector, bits = re.search(r"\.v(\d)", modifiers), re.search(r"\.[bfsu](\d+)$", modifiers)
    return (int(vector[1]) if vector else 1) * int(bits[1]) // 8


def _amdgcn_bytes(suffix: str) -> int:
    return AMDGCN_BYTES[suffix.removeprefix("lds_").split("_")[0]]


def _sass_bytes(modifiers: str) -> int:
    """Bytes of modifiers such as .U16 or .128; without a size it is a 32-bit register."""
    match = re.search(r"\.[SU]?(8|16|64|128|256)\b", modifiers)
    return int(match[1]) // 8 if match else 4
