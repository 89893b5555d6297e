"""``make test-cuda-on-host``: every case under the sanitizers, and faults that are planted in copies of the kernels."""

import shutil
from typing import NamedTuple

import pytest

from cuda_on_host import KERNELS, run_tests, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
# operator -> the sources that its tests run: the norm leaves the gradient of its vectors to special_tokens
OPERATORS = {
    "add_layer_norm_inject": ["add_layer_norm_inject.cu", "special_tokens.cu"],
    "decomposed_prompt_embedding": ["decomposed_prompt_embedding.cu"],
    "special_tokens": ["special_tokens.cu"],
}


class Fault(NamedTuple):
    """A change to one source of an operator, and the message of the check that notices it."""

    operator: str
    source: str
    correct: str
    faulty: str
    checks: str
    message: str


FAULTS = {
    "no barrier before a tile is read": Fault(
        "decomposed_prompt_embedding", "decomposed_prompt_embedding.cuh",
        "__syncthreads();\n    if (column >= e.width) continue;", "if (column >= e.width) continue;",
        "races", "without a barrier between them",
    ),
    "no barrier before a tile is overwritten": Fault(
        "decomposed_prompt_embedding", "decomposed_prompt_embedding.cuh",
        "e.rank - start);\n    __syncthreads();", "e.rank - start);",
        "races", "without a barrier between them",
    ),
    "blocks write one element": Fault(
        "special_tokens", "special_tokens.cuh", "s.counts[row] = count", "s.counts[row % kSlotWarps] = count",
        "races", "has written, without a barrier",
    ),
    "a lane outside the mask of its shuffle": Fault(
        "add_layer_norm_inject", "add_layer_norm_inject.cuh",
        "__shfl_xor_sync(kWarpMask, x[c]", "__shfl_xor_sync(kWarpMask >> 1, x[c]",
        "races", "is not in the mask of __shfl_sync",
    ),
    "a ballot that some lanes do not reach": Fault(
        "special_tokens", "special_tokens.cuh",
        "const unsigned ballot =", "if (position >= s.length) continue;\n      const unsigned ballot =",
        "races", "waits at __ballot_sync",
    ),
    "a barrier that some threads do not reach": Fault(
        "decomposed_prompt_embedding", "decomposed_prompt_embedding.cuh",
        "e.rank - start);\n    __syncthreads();", "e.rank - start);\n    if (column < e.width) __syncthreads();",
        "races", "waits at __syncthreads",
    ),
    "shared memory that nobody writes": Fault(
        "add_layer_norm_inject", "add_layer_norm_inject.cuh",
        "if (threadIdx.x % kLanes == 0) shared[warp][c]", "if (threadIdx.x % kLanes == 0 && warp) shared[warp][c]",
        "races", "nan",
    ),
    "an element past the end is read": Fault(
        "special_tokens", "special_tokens.cuh", "ids[i] = position < s.length", "ids[i] = position <= s.length",
        "sanitizers", "heap-buffer-overflow",
    ),
    "an element past the end is written": Fault(
        "decomposed_prompt_embedding", "decomposed_prompt_embedding.cuh",
        "if (!inside) return;", "if (column > g.width) return;",
        "sanitizers", "heap-buffer-overflow",
    ),
    "four floats at an address of four bytes": Fault(
        "decomposed_prompt_embedding", "decomposed_prompt_embedding.cuh",
        "__shared__ alignas(16) float a_tile", "__shared__ float a_tile",
        "sanitizers", "misaligned address",
    ),
    "rows that are not aligned are read by vectors": Fault(
        "special_tokens", "host.cuh", "% 16 == 0; }) &&", "% 2 == 0; }) &&",
        "sanitizers", "misaligned address",
    ),
}  # fmt: skip


def check_that_the_fault_is_noticed(fault, folder):
    for path in (*KERNELS.glob("*.cuh"), *(KERNELS / name for name in OPERATORS[fault.operator])):
        shutil.copy(path, folder)
    source = (folder / fault.source).read_text()
    assert source.count(fault.correct) == 1, fault.correct
    (folder / fault.source).write_text(source.replace(fault.correct, fault.faulty))
    done = run_tests(f"tests/ops/test_{fault.operator}_cuda.py", checks=fault.checks, kernels=folder)
    assert done.returncode and fault.message in done.stdout, done.stdout[-5000:]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name, tmp_path):
    check_that_the_fault_is_noticed(FAULTS[name], tmp_path)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_case_under_sanitizers(operator):
    done = run_tests(f"tests/ops/test_{operator}_cuda.py", checks="sanitizers")
    assert done.returncode == 0, done.stdout[-5000:]
