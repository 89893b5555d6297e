"""The table: for every version of a compiler that was recorded, the worst that any of them made of a kernel.

One line to a kernel, under its name: architecture, operator, kernel, dtype, configuration.
"""

import json
import re
from pathlib import Path

from .architectures import ARCHITECTURES, blocks_per_processor

PATH = Path(__file__).with_name("kernels.json")
WORST = {"registers": max, "scalars": max, "spills": max, "shared": max, "tensor_memory": max, "load": min, "store": min}


def read() -> dict:
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def write(table: dict) -> None:
    """Sorted, so that a difference is that of the kernels."""
    sections = []
    for name, section in sorted(table.items()):
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(section["kernels"].items(), key=by_name))
        sections.append(f'"{name}": {{"versions": {json.dumps(section["versions"])}, "kernels": {{\n{rows}\n}}}}')
    PATH.write_text("{" + ",\n".join(sections) + "}\n")


def updated(section: dict, found: dict[str, dict], version: str, only: str) -> dict:
    """A section with what was found. Names that ``only`` matches and that were not found are gone."""
    before = section["kernels"]
    rows = {name: row for name, row in before.items() if not re.search(only, name)}
    rows |= {name: with_occupancy(name, worst(row, before.get(name, row))) for name, row in found.items()}
    return {"versions": sorted({*section["versions"], version}), "kernels": rows}


def worst(row: dict, before: dict) -> dict:
    return {key: WORST[key](value, before[key]) if key in WORST else value for key, value in row.items()}


def with_occupancy(name: str, row: dict) -> dict:
    """With the blocks that a processor holds, and the share of its warps that they are."""
    architecture = name.split()[0]
    blocks = blocks_per_processor(architecture, *(row[key] for key in ("warps", "registers", "scalars", "shared", "tensor_memory")))
    return {**row, "blocks": blocks, "occupancy": blocks * row["warps"] / ARCHITECTURES[architecture].warps}


def by_name(item):
    """Architectures in their order, then names with numbers as numbers."""
    architecture, rest = item[0].split(" ", 1)
    return list(ARCHITECTURES).index(architecture), [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", rest)]
