"""docs/kernels.md, generated from the table alone."""

from collections import Counter
from pathlib import Path

PATH = Path(__file__).parents[2] / "docs/kernels.md"
HEAD = """\
# Compiled kernels

`make kernels` writes this page. It needs no GPU: it compiles every default config of every kernel for four
architectures and reads the resources from the binaries. `tools/kernel_report/kernels.json` has the same numbers
for programs. The tests compare a new build with it: a spill or a lost tensor-core instruction fails, and, with a
recorded compiler, so does a register or a byte more than in the table.

- **Registers** per thread; on gfx942 the vector registers, including accumulation registers, and the **scalar**
  registers of a wavefront. **Spills**: bytes per thread.
- **Shared**: bytes of shared memory (LDS on gfx942) per block. **TMEM**: columns of tensor memory.
- **Warps** per block (wavefronts on gfx942), and the number of **blocks** that an SM (CU on AMD) holds, as limited
  by registers, shared memory, tensor memory, warps and the limit of blocks. **Occupancy**: their warps as a share of
  the SM's.
- **Matrix unit**: the tensor-core instruction of the matmuls. `FMA`: matmuls without tensor cores, by design:
  float32 results have to be exact, and NVIDIA's tensor cores are too coarse for that. Empty: no matmul.
- **Load**, **store**: bytes of the widest access of one thread to global memory.

If several versions of a compiler are recorded, a row shows the worst of them; a kernel in which a version spills or
loses a tensor-core instruction has no record of that version. The config names the kernel's constants as its source
does. sm_80 also serves 8.6 and 8.9, so its kernels request at most 99 KiB.

Blocks of CUDA C++ kernels have the warps of their launch bounds. `add_layer_norm_inject` and its backward pass launch
4 warps up to a width of 4096, 8 up to 8192 and 16 beyond; the table shows 16. `V` is the number of elements per
access, 1 for rows that are not aligned to 16 bytes. Only `decomposed_prompt_embedding_fwd_kernel` has a matmul: its
low-rank product in float32, without tensor cores, with `P` positions per warp.
"""
COLUMNS = {
    "kernel": "kernel", "dtype": "dtype", "configuration": "configuration",
    "registers": "registers", "scalars": "scalar", "spills": "spills", "shared": "shared", "tensor_memory": "TMEM",
    "warps": "warps", "blocks": "blocks", "occupancy": "occupancy", "matrix_unit": "matrix unit", "load": "load",
    "store": "store",
}  # fmt: skip
OPTIONAL = ("scalars", "tensor_memory")  # columns that not every architecture has
IMPLEMENTATIONS = {"triton": "Triton", "cuda": "CUDA C++"}


def text(table: dict) -> str:
    rows = [
        {
            **dict(zip(("architecture", "operator", "kernel", "dtype", "configuration"), name.split(" ", 4))),
            "implementation": implementation,
            **row,
        }
        for implementation in IMPLEMENTATIONS
        for name, row in table.get(implementation, {}).items()
    ]
    versions = Counter(
        f"{IMPLEMENTATIONS[row['implementation']]} {version}" for row in rows for version in row["versions"]
    )
    counts = ", ".join(f"{version} ({count} kernels)" for version, count in sorted(versions.items()))
    parts = [HEAD, f"Compilers: {counts}.\n", "## Summary\n", summary(rows)]
    for operator, of_operator in grouped(rows, "operator"):
        parts.append(f"## {operator}\n")
        for (architecture, implementation), of_architecture in grouped(of_operator, "architecture", "implementation"):
            parts.append(f"### {operator}, {IMPLEMENTATIONS[implementation]}, {architecture}\n")
            parts.append(table_of(of_architecture))
    return "\n".join(parts)


def summary(rows: list[dict]) -> str:
    """The extremes of every operator."""
    lines = []
    for (operator, implementation, architecture), group in grouped(rows, "operator", "implementation", "architecture"):
        units = [row["matrix_unit"] for row in group if row["matrix_unit"]]
        counts = ", ".join(f"{units.count(unit)} {shown('matrix_unit', unit)}" for unit in dict.fromkeys(units))
        most = [max(row[key] for row in group) for key in ("spills", "registers", "shared")]
        occupancy = shown("occupancy", min(row["occupancy"] for row in group))
        lines.append([operator, IMPLEMENTATIONS[implementation], architecture, len(group), *most, occupancy, counts])
    heads = (
        "operator",
        "implementation",
        "architecture",
        "kernels",
        "spills",
        "most registers",
        "most shared",
        "least occupancy",
        "matrix units",
    )
    return markdown(heads, lines, names=3)


def table_of(rows: list[dict]) -> str:
    columns = [key for key in COLUMNS if key not in OPTIONAL or any(row[key] for row in rows)]
    return markdown(
        [COLUMNS[key] for key in columns], [[shown(key, row[key]) for key in columns] for row in rows], names=3
    )


def shown(key: str, value) -> str:
    if key == "occupancy":
        return f"{100 * value:g} %"
    if key == "matrix_unit":
        return {None: "", "fma": "FMA"}.get(value, value)
    return str(value)


def grouped(rows: list[dict], *keys: str):
    """Groups of rows with equal values, in order of first appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys), []).append(row)
    return groups.items()


def markdown(heads, lines, names: int) -> str:
    """A Markdown table with the first ``names`` columns left-aligned and the numbers right-aligned."""
    rule = ["---"] * names + ["---:"] * (len(heads) - names)
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (heads, rule, *lines))
