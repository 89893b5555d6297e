"""Every shipped configuration is compiled for every family of GPU, without one, and held against what its binary held before."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from test_decomposed_prompt_embedding_compiles import SHARED_LIMIT, check, compile_all

from peft_kernels.ops.cuda_library import LIBRARY

SCRIPT = Path(__file__).with_name("compile_pasta.py")
TABLE = json.loads(SCRIPT.with_name("compiled_pasta.json").read_text())


def accesses(family, dtype, kernel, columns):
    """16-byte accesses; those of one row on AMD are short, since a block there has twice as many threads."""
    if kernel == "slots":
        return set()
    if kernel.startswith("vectors"):
        return {"load16"}
    if kernel == "add" and family == "gfx942":
        return {"load16"} if dtype == "bf16" else set()
    return {"load16", "store16"}


@pytest.mark.parametrize("family", SHARED_LIMIT)
def test_triton(family):
    version, found = compile_all(SCRIPT, "--only", f"^{family} ")
    table = TABLE["triton"]
    check(SCRIPT, found, {name: row for name, row in table["kernels"].items() if name.startswith(f"{family} ")}, version in table["versions"])
    for name, row in found.items():
        assert set(row["instructions"]) == accesses(*name.split()), f"{name}: {row}"


@pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built: no nvcc")
def test_cuda():
    version, found = compile_all(SCRIPT, "--cuda")
    table = TABLE["cuda"]
    check(SCRIPT, found, table["kernels"], version in table["versions"])
    for name, row in found.items():
        scalar = name.endswith(("V=1", "special_token_slots"))
        assert set(row["instructions"]) == (set() if scalar else {"load16", "store16"}), f"{name}: {row}"
        if "add_layer_norm" in name:
            assert row["registers"] <= 128, f"{name}: blocks of 512 threads"
