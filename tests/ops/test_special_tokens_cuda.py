"""The CUDA C++ kernels against the reference, with ``--device cuda``."""

import pytest
import torch
from special_tokens_on_gpu import *  # noqa: F403
from special_tokens_on_gpu import check_slots

from peft_kernels.ops import cuda_library
from peft_kernels.ops.special_tokens import cuda


@pytest.fixture
def implementation(device):
    if reason := cuda.unavailable(device.type, torch.float32):
        pytest.skip(reason)
    return cuda


def test_slots_of_more_rows_than_a_block_has(implementation, poisoned, device):
    check_slots(implementation, torch.randint(0, 9, (37, 300), device=device), torch.arange(2, device=device), None, 90)


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built: no nvcc")
def test_is_registered():
    cuda_library.load_error()
    for name in ("special_token_add", "special_token_add_backward", "special_token_slots"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_kernels::{name}_cuda", "CUDA")
