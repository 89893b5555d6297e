"""The CUDA C++ kernels on the CPU under ASan and UBSan, in a small form; ``make test-cuda-on-host`` runs every case.

The tests of the operators' CUDA implementations (test_*_cuda.py) run them in every order, with detection of races.
"""

import cuda_on_host
import pytest
from cuda_on_host import full

pytestmark = pytest.mark.skipif(cuda_on_host.unavailable() is not None, reason=str(cuda_on_host.unavailable()))
FEW = "out_of_range or not_aligned or width or (no_worse and (adapters or strided or tiles or warps) and not dtype1)"


def test_a_few_cases_under_sanitizers():
    files = [f"tests/ops/test_{operator}_cuda.py" for operator in full.OPERATORS]
    done = cuda_on_host.run_tests(*files, "-k", FEW, checks="sanitizers")
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("name", ["blocks write one element", "an element past the end is read"])
def test_a_fault_is_noticed(name, tmp_path):
    full.check_that_the_fault_is_noticed(full.FAULTS[name], tmp_path)
