"""Every shipped configuration is compiled for every family of GPU, without one, and held against what its binary held before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from peft_kernels.ops.cuda_library import LIBRARY

HERE = Path(__file__).parent
SCRIPT = HERE / "compile_decomposed_prompt_embedding.py"
TABLE = json.loads((HERE / "compiled_decomposed_prompt_embedding.json").read_text())
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # sm_80's row is also that of smaller chips
REGISTER_LIMIT = {"sm_80": 168, "sm_90": 168, "sm_100": 168, "gfx942": 168}  # three blocks of 128 threads to a processor


def instructions(family, dtype, kernel):
    """16-byte accesses, and the matrix instruction of the family in the product, whose operands are float32: exact on AMD alone."""
    if kernel == "backward":
        return {"load16"}
    if kernel == "delta" or (dtype == "fp32" and family != "gfx942"):
        return {"load16", "store16"}
    return {"load16", "store16", "mfma" if family == "gfx942" else "mma"}


def compile_all(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    environment.pop("TRITON_INTERPRET", None)  # the script's first import is Triton, which decorates its own functions
    processes = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    output = subprocess.run([sys.executable, script, "-j", processes, *arguments], env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    version, *lines = output.stdout.splitlines()
    found = {}
    for line in lines:
        found.update(json.loads(line))
    return version, found


def check(script, found, expected, recorded):
    assert found.keys() == expected.keys(), f"the kernels changed: python tests/ops/{script.name} --write, and again with --cuda"
    for name, row in found.items():
        assert "error" not in row, f"{name}: {row['error']}"
        assert row["spills"] == 0, f"{name}: {row}"
        family = name.split()[0]
        assert row["shared"] <= (expected[name]["shared"] if recorded else SHARED_LIMIT[family]) <= SHARED_LIMIT[family], f"{name}: {row}"
        assert row["registers"] <= (expected[name]["registers"] if recorded else REGISTER_LIMIT[family]) <= REGISTER_LIMIT[family], f"{name}: {row}"


@pytest.mark.parametrize("family", SHARED_LIMIT)
def test_triton(family):
    version, found = compile_all(SCRIPT, "--only", f"^{family} ")
    table = TABLE["triton"]
    check(SCRIPT, found, {name: row for name, row in table["kernels"].items() if name.startswith(f"{family} ")}, version in table["versions"])
    for name, row in found.items():
        assert set(row["instructions"]) == instructions(*name.split()), f"{name}: {row}"


@pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built: no nvcc")
def test_cuda():
    version, found = compile_all(SCRIPT, "--cuda")
    table = TABLE["cuda"]
    check(SCRIPT, found, table["kernels"], version in table["versions"])
    for name, row in found.items():
        assert set(row["instructions"]) == ({"load16", "store16"} if " V=1" not in name else set()), f"{name}: {row}"
