"""The table: for every kernel the worst result of any recorded version of its compiler.

One line per kernel, keyed by its name: architecture, operator, kernel, dtype, configuration.
"""

import json
import re
from pathlib import Path

from .architectures import ARCHITECTURES, blocks_per_sm

PATH = Path(__file__).with_name("kernels.json")
WORST = {
    "registers": max,
    "scalars": max,
    "spills": max,
    "shared": max,
    "tensor_memory": max,
    "load": min,
    "store": min,
}


def read() -> dict:
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def write(table: dict) -> None:
    """Write the table sorted, so that a diff shows changes of kernels only."""
    sections = []
    for name, kernels in sorted(table.items()):
        rows = ",\n".join(
            f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(kernels.items(), key=by_name)
        )
        sections.append(f'"{name}": {{\n{rows}\n}}')
    PATH.write_text("{" + ",\n".join(sections) + "}\n")


def updated(before: dict[str, dict], compiled: dict[str, dict | None], version: str, only: str) -> dict[str, dict]:
    """Update the rows with ``compiled``.

    A kernel that is None in it keeps its row; names that match ``only`` and are not in it are removed.
    """
    rows = {
        name: row
        for name, row in before.items()
        if not re.search(only, name) or (name in compiled and compiled[name] is None)
    }
    for name, row in compiled.items():
        if row is not None:
            old = before.get(name, {**row, "versions": []})
            rows[name] = {**with_occupancy(name, worst(row, old)), "versions": sorted({*old["versions"], version})}
    return rows


def worst(row: dict, before: dict) -> dict:
    return {key: WORST[key](value, before[key]) if key in WORST else value for key, value in row.items()}


def with_occupancy(name: str, row: dict) -> dict:
    """Add the blocks that an SM holds, and the share of its warps that they fill."""
    architecture = name.split()[0]
    blocks = blocks_per_sm(
        architecture, *(row[key] for key in ("warps", "registers", "scalars", "shared", "tensor_memory"))
    )
    return {**row, "blocks": blocks, "occupancy": blocks * row["warps"] / ARCHITECTURES[architecture].warps}


def by_name(item):
    """Sort key: architectures in their order, then names with numbers compared as numbers."""
    architecture, rest = item[0].split(" ", 1)
    return list(ARCHITECTURES).index(architecture), [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", rest)
    ]
