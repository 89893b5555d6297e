"""The table: of every kernel the worst that any of the recorded versions of its compiler made of it.

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
    for name, kernels in sorted(table.items()):
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(kernels.items(), key=by_name))
        sections.append(f'"{name}": {{\n{rows}\n}}')
    PATH.write_text("{" + ",\n".join(sections) + "}\n")


def updated(before: dict[str, dict], found: dict[str, dict | None], version: str, only: str) -> dict[str, dict]:
    """Rows with what was found. One found as None stays as it is; names that ``only`` matches and that were not found are gone."""
    rows = {name: row for name, row in before.items() if not re.search(only, name) or (name in found and found[name] is None)}
    for name, row in found.items():
        if row is not None:
            known = before.get(name, {**row, "versions": []})
            rows[name] = {**with_occupancy(name, worst(row, known)), "versions": sorted({*known["versions"], version})}
    return rows


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
