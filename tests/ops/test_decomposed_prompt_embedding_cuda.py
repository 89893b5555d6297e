"""The CUDA C++ kernels against the reference, with ``--device cuda``; without a GPU, their library loads and says why
it does not run.
"""

from types import SimpleNamespace

import cuda_on_host
import pytest
import torch
from decomposed_prompt_embedding_on_gpu import *  # noqa: F403
from decomposed_prompt_embedding_on_gpu import PROBLEMS, Problem, all_results, check_all

from peft_kernels.ops import cuda_library
from peft_kernels.ops.decomposed_prompt_embedding import cuda


@pytest.fixture
def implementation(device, monkeypatch):
    return cuda_on_host.implementation(cuda, device, monkeypatch)


@pytest.mark.parametrize("chosen", [[0] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1], [-1, 0, 1, 0, -1, 0, 0, -1, -1]])
def test_a_block_of_several_rows(chosen, implementation, poisoned, device):
    repeats = 64 if device.type == "cuda" else 3  # as many as the device has multiprocessors for
    arguments, grad = Problem(9 * repeats, 70, 33, 5, 512, adapters=2, offsets=True).make(torch.float16, device)
    check_all(implementation, (*arguments[:10], torch.tensor(chosen, device=device).repeat(repeats)), grad)


OUT_OF_RANGE = [
    *(("input_ids", value, 22) for value in (23, 24, -1, -5)),
    *(("offsets", value, 13) for value in (14, 99, -3)),
    *(("adapter_ids", value, -1) for value in (3, -2)),
]


@pytest.mark.parametrize("name, value, meaning", OUT_OF_RANGE)
def test_a_value_out_of_range(name, value, meaning, implementation, poisoned, device):
    """It means the last row of the table, no updated token, or no adapter: no kernel leaves its tensors' memory."""
    arguments, grad = PROBLEMS["adapters"].make(torch.float32, device)
    results = []
    for written in (value, meaning):
        input_ids, offsets, adapter_ids = arguments[0].clone(), arguments[8].clone(), torch.zeros_like(arguments[10])
        {"input_ids": input_ids, "offsets": offsets, "adapter_ids": adapter_ids}[name][1:3] = written
        results.append(all_results(implementation, (input_ids, *arguments[1:8], offsets, False, adapter_ids), grad))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


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


def test_asks_for_the_current_device(monkeypatch):
    """Each device has its own answer, and the library opens no context on another one."""
    asked = []

    def problem_of(device):
        asked.append(device)
        return b"too old" if device == 1 else None

    monkeypatch.setattr(cuda_library, "load_error", lambda: None)
    monkeypatch.setattr(cuda_library, "CDLL", lambda path: SimpleNamespace(peft_kernels_cuda_device_error=problem_of))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    cuda_library.device_error.cache_clear()
    too_old = "device 1 does not run the CUDA library: too old"
    for device, reason in ((1, too_old), (2, None), (1, too_old)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
        assert cuda.unavailable("cuda", torch.float32) == reason
    cuda_library.device_error.cache_clear()
    assert asked == [1, 2]


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built: no nvcc")
def test_the_library_loads_without_a_gpu():
    """It links against no CUDA library; `unavailable` says that a driver is missing here."""
    reason = cuda.unavailable("cuda", torch.float32)
    assert (reason is None) if torch.cuda.is_available() else "does not run the CUDA library" in reason
    for name in ("decomposed_prompt_embedding_cuda", "decomposed_prompt_embedding_backward_cuda"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_kernels::{name}", "CUDA")
