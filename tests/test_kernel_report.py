"""The report on compiled kernels.

`make test-kernels` compiles every default config for every architecture; here a few of them.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from peft_kernels.ops.variant import Expected
from tools.kernel_report import check, page, table
from tools.kernel_report.architectures import ARCHITECTURES, blocks_per_sm

NAME = "sm_90 shared_cross_attention attend bf16 BM=64"
ROW = {
    "registers": 168, "scalars": 0, "spills": 0, "shared": 65536, "tensor_memory": 0, "warps": 4,
    "matrix_unit": "wgmma", "load": 16, "store": 16,
}  # fmt: skip
RECORDED = {**ROW, "versions": ["3.9"]}
EXPECTED = Expected("wgmma", store=16, warps=12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled(architecture):
    """In a new process without Triton's interpreter, which is chosen when a kernel is decorated."""
    command = [
        sys.executable,
        "-m",
        "tools.kernel_report",
        "--check",
        "-j",
        "1",
        "--only",
        f"^{architecture} label_logits",
    ]
    output = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert output.returncode == 0, f"{output.stderr}\nif that is meant: make kernels"
    assert output.stdout


def test_page_is_that_of_the_table():
    assert page.PATH.read_text() == page.text(table.read()), "make kernels"


def test_nothing_is_wrong_with_a_good_kernel():
    assert check.problems(NAME, ROW, EXPECTED) == []
    assert check.changes({NAME: ROW}, {NAME: RECORDED}, "3.9") == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spills": 8}, "8 bytes of registers are spilled"),
        ({"matrix_unit": "mma"}, "multiplied by mma, expected wgmma"),
        ({"matrix_unit": "wgmma+mma"}, "multiplied by wgmma+mma, expected wgmma"),
        ({"matrix_unit": None}, "multiplied by None, expected wgmma"),
        ({"shared": 228 << 10}, "shared memory"),
        ({"registers": 176}, "2 blocks of 4 warps"),
        ({"load": 8}, "widest load has 8"),
        ({"store": 4}, "widest store has 4"),
    ],
)
def test_a_problem_is_named(change, message):
    problems = check.problems(NAME, {**ROW, **change}, EXPECTED)
    assert problems and all(problem.startswith(NAME) for problem in problems) and message in problems[0]


def test_rows_of_any_alignment_take_no_wide_access():
    assert "widest load has 16" in check.problems(NAME, ROW, EXPECTED._replace(load=1, store=1, widest=8))[0]


def test_a_kernel_that_does_not_compile_is_a_problem():
    assert check.problems(NAME, {"error": "OutOfResources"}, EXPECTED) == [f"{NAME}: OutOfResources"]


@pytest.mark.parametrize("change", [{"registers": 169}, {"shared": 65537}, {"spills": 1}, {"load": 8}, {"store": 8}])
def test_worse_than_the_table_in_a_recorded_version(change):
    worse = {**RECORDED, **change}
    assert len(check.changes({NAME: worse}, {NAME: RECORDED}, "3.9")) == 1
    assert check.changes({NAME: worse}, {NAME: RECORDED}, "3.6") == []
    assert check.changes({NAME: ROW}, {NAME: worse}, "3.9") == []  # better


@pytest.mark.parametrize("compiled, rows", [({}, {NAME: RECORDED}), ({NAME: ROW}, {})])
def test_the_table_has_the_default_configs(compiled, rows):
    assert len(check.changes(compiled, rows, "3.6")) == 1


def test_the_table_keeps_the_worst_of_all_versions():
    first = table.updated({}, {NAME: {**ROW, "registers": 170, "load": 8}}, "3.6", "")
    both = table.updated(first, {NAME: {**ROW, "shared": 81920}}, "3.9", "")
    row = both[NAME]
    assert row["versions"] == ["3.6", "3.9"]
    assert (row["registers"], row["shared"], row["load"], row["blocks"], row["occupancy"]) == (170, 81920, 8, 2, 8 / 64)
    assert table.updated(both, {}, "3.9", "^sm_80 ") == table.updated(both, {NAME: None}, "3.10", "") == both
    assert table.updated(both, {}, "3.9", "^sm_90 ") == {}


@pytest.mark.parametrize(
    "architecture, needs, blocks",
    [  # warps per block, registers, scalars, shared, tensor memory; by hand from the limits of the architecture
        ("sm_80", (4, 32, 0, 0, 0), 16),  # 64 warps
        ("sm_80", (1, 16, 0, 0, 0), 32),  # 32 blocks
        ("sm_80", (8, 64, 0, 0, 0), 4),  # 65536 registers
        ("sm_80", (4, 255, 0, 0, 0), 2),
        ("sm_80", (4, 168, 0, 0, 0), 3),  # three warps per scheduler, of four
        ("sm_80", (4, 32, 0, 36 << 10, 0), 4),  # 164 KiB, 1 KiB of it for every block
        ("sm_90", (4, 32, 0, 227 << 10, 0), 1),
        ("sm_100", (4, 32, 0, 1024, 256), 2),  # 512 columns
        ("gfx942", (4, 128, 32, 0, 0), 4),  # 512 registers per SIMD
        ("gfx942", (4, 64, 32, 20 << 10, 0), 3),  # 64 KiB
        ("gfx942", (4, 44, 100, 64, 0), 6),  # 800 scalar registers
        ("gfx942", (2, 32, 32, 0, 0), 16),  # 32 wavefronts
    ],
)
def test_occupancy(architecture, needs, blocks):
    assert blocks_per_sm(architecture, *needs) == blocks
