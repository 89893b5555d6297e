"""The Triton kernels against the reference: in the interpreter without a GPU, on it with ``--device cuda``."""

import pytest
import torch

pytest.importorskip("triton")
from decomposed_prompt_embedding_on_gpu import *  # noqa: F403
from decomposed_prompt_embedding_on_gpu import Problem, check_all

from peft_kernels.ops import triton_runtime
from peft_kernels.ops.decomposed_prompt_embedding import triton


@pytest.fixture
def implementation(device):
    if reason := triton.unavailable(device.type, torch.float32):
        pytest.skip(reason)
    return triton


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_rows_of_the_batch_to_a_program(rows, implementation, poisoned, device, monkeypatch):
    monkeypatch.setattr(implementation, "rows_per_program", lambda batch, programs_per_row, processors: rows)
    arguments, grad = Problem(9, 18, 3, 5, 40, adapters=2, offsets=True).make(torch.float32, device)
    for adapter_ids in ([0, 0, 0, 1, 1, 1, 1, 1, 1], [-1, 0, 1, 0, -1, 0, 0, -1, -1]):
        check_all(implementation, (*arguments[:10], torch.tensor(adapter_ids, device=device)), grad)


def test_rows_of_the_batch_share_a_product_where_the_device_is_full():
    assert triton.rows_per_program(16, 60, 132) == 3
    assert triton.rows_per_program(1, 60, 132) == 1
    assert triton.rows_per_program(64, 4000, 132) == triton.MAX_ROWS


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
