"""The Triton kernels against the reference: in the interpreter without a GPU, on it with ``--device cuda``."""

import pytest
import torch

pytest.importorskip("triton")
from special_tokens_on_gpu import *  # noqa: F403

from peft_kernels.ops import triton_runtime
from peft_kernels.ops.special_tokens import triton


@pytest.fixture
def implementation(device):
    if reason := triton.unavailable(device.type, torch.float32):
        pytest.skip(reason)
    return triton


def test_parts_of_the_batch():
    assert triton.partition(8, 1, 12) == (1, 8)
    assert triton.partition(4096, 1, 12) == (42, 98)
    assert triton.partition(4096, 1, 600) == (1, 4096)
    assert triton.partition(0, 1, 0) == (1, 1)


@pytest.mark.parametrize(
    "device_type, dtype, reason", [("cuda", torch.float64, "float64"), ("mps", torch.float32, "not mps")]
)
def test_says_why_it_cannot_run(device_type, dtype, reason):
    assert reason in triton.unavailable(device_type, dtype)


def test_refuses_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    assert "TRITON_INTERPRET" in triton.unavailable("cpu", torch.float32)
    monkeypatch.setattr(triton_runtime, "INSTALLED", False)
    assert triton.unavailable("cuda", torch.float32) == "triton is not installed"
