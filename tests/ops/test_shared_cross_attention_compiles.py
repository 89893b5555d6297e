"""Every shipped configuration is compiled for every family of GPU, without one, and held against what its binary held before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
TABLE = json.loads((HERE / "compiled_shared_cross_attention.json").read_text())
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # sm_80's row is also that of smaller chips
REGISTER_LIMIT = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}  # of 64 rows and more


def instructions(family, dtype, kernel, block):
    """What a kernel must hold: 16-byte loads, and the matrix instruction of its family. Float32 is exact, so NVIDIA has none for it."""
    if kernel in ("merge", "delta") or (dtype == "fp32" and family != "gfx942"):
        return {"load16"}
    few_rows = kernel == "attend" and int(block.split("x")[0]) < 64
    return {"load16", "mma" if few_rows and family != "gfx942" else MATRIX[family]}


@pytest.mark.parametrize("dtype", ["fp32", "16"])
@pytest.mark.parametrize("family", SHARED_LIMIT)
def test_compiles(family, dtype):
    only = f"^{family} fp32" if dtype == "fp32" else f"^{family} (bf16|fp16)"
    processes = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, HERE / "compile_shared_cross_attention.py", "--only", only, "-j", processes]
    output = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    found = {}
    for line in output.stdout.splitlines():
        found.update(json.loads(line))

    expected = {name: row for name, row in TABLE["kernels"].items() if name.startswith(f"{family} ") and (" fp32 " in name) == (dtype == "fp32")}
    assert found.keys() == expected.keys(), "the table of configurations changed: python tests/ops/compile_shared_cross_attention.py --write"
    recorded = ".".join(triton.__version__.split(".")[:2]) in TABLE["triton"]
    for name, row in found.items():
        assert "error" not in row, f"{name}: {row['error']}"
        assert row["spills"] == 0, f"{name}: {row}"
        _, storage, _, kernel, *block = name.split()
        assert set(row["instructions"]) == instructions(family, storage, kernel, *block or [""]), f"{name}: {row}"
        assert row["instructions"] == expected[name]["instructions"], f"{name}: {row}"
        assert row["shared"] <= (expected[name]["shared"] if recorded else SHARED_LIMIT[family]) <= SHARED_LIMIT[family], f"{name}: {row}"
        assert row["registers"] <= (expected[name]["registers"] if recorded else REGISTER_LIMIT[family]), f"{name}: {row}"
