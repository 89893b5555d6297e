"""The CUDA C++ kernels against the reference, with ``--device cuda``."""

import cuda_on_host
import pytest
import torch
from special_tokens_on_gpu import *  # noqa: F403
from special_tokens_on_gpu import PROBLEMS, all_results, check_slots

from peft_kernels.ops import cuda_library
from peft_kernels.ops.special_tokens import cuda


@pytest.fixture
def implementation(device, monkeypatch):
    return cuda_on_host.implementation(cuda, device, monkeypatch)


def test_slots_of_more_rows_than_a_block_has(implementation, poisoned, device):
    check_slots(implementation, torch.randint(0, 9, (37, 300), device=device), torch.arange(2, device=device), None, 90)


OUT_OF_RANGE = [*(("slots", value) for value in (13, 15, -3)), ("adapter_ids", 3), ("adapter_ids", -2)]


@pytest.mark.parametrize("name, value", OUT_OF_RANGE)
def test_a_value_out_of_range_is_none(name, value, implementation, poisoned, device):
    (hidden, vectors, slots, p, seed, adapter_ids), grad = PROBLEMS["adapters"].make(torch.float32, device)
    results = []
    for written in (value, -1):
        indices = {"slots": slots.clone(), "adapter_ids": torch.zeros_like(adapter_ids)}
        indices[name][1:3] = written
        arguments = hidden, vectors, indices["slots"], p, seed, indices["adapter_ids"]
        results.append(all_results(implementation, arguments, grad))
    for result, none in zip(results[0].values(), results[1].values()):
        assert torch.equal(result, none)


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built: no nvcc")
def test_is_registered():
    cuda_library.load_error()
    for name in ("special_token_add", "special_token_add_backward", "special_token_slots"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_kernels::{name}_cuda", "CUDA")
