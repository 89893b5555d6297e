"""Every shipped configuration is compiled for every family of GPU, without one, and held against what its binary held before.

Two tests, for two workers: a process for each family would spend as long on its imports as on a dozen kernels.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from test_decomposed_prompt_embedding_compiles import compile_all
from test_shared_cross_attention_compiles import MATRIX, REGISTER_LIMIT, SHARED_LIMIT

SCRIPT = Path(__file__).with_name("compile_labels.py")
TABLE = json.loads(SCRIPT.with_name("compiled_labels.json").read_text())["triton"]


def multiplies(family, dtype, kernel, _):
    """The matrix instruction of the family in products over the features. Float32 is exact, so NVIDIA has none for it."""
    products = kernel in ("scores", "pool", "pool_float")
    return {MATRIX[family]} if products and (family == "gfx942" or dtype in ("bf16", "fp16")) else set()


def wide_loads(kernel, dtype):
    """Weights have a row of any number of queries; a block of 16 bfloat16 columns to a token may be 8 bytes to a thread."""
    return not kernel.startswith("softmax") and dtype != "mixed"


@pytest.mark.parametrize("families", [("sm_80", "gfx942"), ("sm_90", "sm_100")])
def test_triton(families):
    version, found = compile_all(SCRIPT, "--only", f"^({'|'.join(families)}) ")
    recorded, expected = version in TABLE["versions"], {name: row for name, row in TABLE["kernels"].items() if name.startswith(families)}
    assert found.keys() == expected.keys(), "the kernels changed: python tests/ops/compile_labels.py --write"
    for name, row in found.items():
        assert "error" not in row, f"{name}: {row['error']}"
        assert row["spills"] == 0, f"{name}: {row}"
        assert set(row["instructions"]) - {"load16", "store16"} == multiplies(*name.split()), f"{name}: {row}"
        family, dtype, kernel, _ = name.split()
        assert "load16" in row["instructions"] or not wide_loads(kernel, dtype), f"{name}: {row}"
        assert row["instructions"] == expected[name]["instructions"] or not recorded, f"{name}: {row}"
        assert row["shared"] <= (expected[name]["shared"] if recorded else SHARED_LIMIT[family]) <= SHARED_LIMIT[family], f"{name}: {row}"
        assert row["registers"] <= (expected[name]["registers"] if recorded else REGISTER_LIMIT[family]) <= REGISTER_LIMIT[family], f"{name}: {row}"
