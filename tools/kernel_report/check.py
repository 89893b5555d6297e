"""Faults of a kernel, in itself and against its row of the table."""

from peft_kernels.ops.variant import Expected

from .architectures import ARCHITECTURES
from .table import WORST, with_occupancy


def problems(name: str, row: dict, expected: Expected) -> list[str]:
    """The faults of a binary, from any compiler."""
    if "error" in row:
        return [f"{name}: {row['error']}"]
    architecture = ARCHITECTURES[name.split()[0]]
    blocks = with_occupancy(name, row)["blocks"]
    faults = []
    if row["spills"]:
        faults.append(f"{row['spills']} bytes of registers are spilled")
    if row["matrix_unit"] != expected.matrix_unit:
        faults.append(f"matrices are multiplied by {row['matrix_unit']}, expected {expected.matrix_unit}")
    if row["shared"] > architecture.shared_per_block:
        faults.append(f"{row['shared']} bytes of shared memory, a block has {architecture.shared_per_block}")
    if not blocks or blocks * row["warps"] < expected.warps:
        faults.append(f"{blocks} blocks of {row['warps']} warps fit on an SM, expected {expected.warps} warps")
    for access in ("load", "store"):
        least = getattr(expected, access)
        if not (least <= row[access] <= expected.widest):
            faults.append(f"the widest {access} has {row[access]} bytes, expected {least} to {expected.widest}")
    return [f"{name}: {fault}" for fault in faults]


def changes(compiled: dict[str, dict], rows: dict[str, dict], version: str) -> list[str]:
    """Regressions against the table.

    A compiler version that is not recorded there may need other resources, but not have other kernels.
    """
    names = [f"{name}: not in the table" for name in compiled.keys() - rows.keys()]
    names += [f"{name}: in the table, but no default config compiles to it" for name in rows.keys() - compiled.keys()]
    worse = []
    for name in compiled.keys() & rows.keys():
        for key, of in WORST.items() if version in rows[name]["versions"] and "error" not in compiled[name] else ():
            if of(compiled[name][key], rows[name][key]) != rows[name][key]:
                worse.append(f"{name}: {key} is {compiled[name][key]}, in the table {rows[name][key]}")
    return sorted(names + worse)
