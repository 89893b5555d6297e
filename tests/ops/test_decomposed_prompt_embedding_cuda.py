"""The CUDA C++ kernels against the reference, with ``--device cuda``; without a GPU, their library loads and says why
it does not run.
"""

import pytest
import torch
from decomposed_prompt_embedding_on_gpu import *  # noqa: F403
from decomposed_prompt_embedding_on_gpu import Problem, check_all

from peft_kernels.ops import cuda_library
from peft_kernels.ops.decomposed_prompt_embedding import cuda


@pytest.fixture
def implementation(device):
    if reason := cuda.unavailable(device.type, torch.float32):
        pytest.skip(reason)
    return cuda


@pytest.mark.parametrize("chosen", [[0] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1], [-1, 0, 1, 0, -1, 0, 0, -1, -1]])
def test_a_block_of_several_rows(chosen, implementation, poisoned, device):
    arguments, grad = Problem(9 * 64, 70, 33, 5, 512, adapters=2, offsets=True).make(torch.float16, device)
    check_all(implementation, (*arguments[:10], torch.tensor(chosen, device=device).repeat(64)), grad)


@pytest.mark.parametrize(
    "device_type, dtype, reason", [("cpu", torch.float32, "not on cpu"), ("cuda", torch.float64, "float64")]
)
def test_says_why_it_cannot_run(device_type, dtype, reason):
    assert reason in cuda.unavailable(device_type, dtype)


def test_refuses_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in cuda.unavailable("cuda", torch.float32)


def test_says_that_it_is_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_library, "LIBRARY", tmp_path / "nothing.so")
    cuda_library.load_error.cache_clear()
    assert "nvcc" in cuda.unavailable("cuda", torch.float32)
    cuda_library.load_error.cache_clear()


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built: no nvcc")
def test_the_library_loads_without_a_gpu():
    """It links against no CUDA library; `unavailable` says that a driver is missing here."""
    reason = cuda.unavailable("cuda", torch.float32)
    assert (reason is None) if torch.cuda.is_available() else "the device does not run the CUDA library" in reason
    for name in ("decomposed_prompt_embedding_cuda", "decomposed_prompt_embedding_backward_cuda"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_kernels::{name}", "CUDA")
