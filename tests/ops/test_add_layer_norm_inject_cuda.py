"""The CUDA C++ kernels against the reference, with ``--device cuda``."""

import pytest
import torch
from add_layer_norm_inject_on_gpu import *  # noqa: F403
from add_layer_norm_inject_on_gpu import Problem

from peft_kernels.ops import cuda_library
from peft_kernels.ops.add_layer_norm_inject import cuda


@pytest.fixture
def implementation(device):
    if reason := cuda.unavailable(device.type, torch.float32):
        pytest.skip(reason)
    return cuda


def test_refuses_rows_that_do_not_fit_in_registers(device):
    arguments, *_ = Problem(1, 1, 16392).make(torch.float32, device)
    with pytest.raises(ValueError, match="up to 16384"):
        cuda.forward(*arguments)


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built: no nvcc")
def test_is_registered():
    cuda_library.load_error()
    for name in ("add_layer_norm_inject", "add_layer_norm_inject_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_kernels::{name}_cuda", "CUDA")
