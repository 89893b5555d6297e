"""The CUDA C++ kernels against the reference, with ``--device cuda``."""

import cuda_on_host
import pytest
import torch
from add_layer_norm_inject_on_gpu import *  # noqa: F403
from add_layer_norm_inject_on_gpu import PROBLEMS, Problem, all_results

from peft_kernels.ops import cuda_library
from peft_kernels.ops.add_layer_norm_inject import cuda


@pytest.fixture
def implementation(device, monkeypatch):
    return cuda_on_host.implementation(cuda, device, monkeypatch)


def test_refuses_rows_that_do_not_fit_in_registers(device):
    arguments, *_ = Problem(1, 1, 16392).make(torch.float32, device)
    with pytest.raises(ValueError, match="up to 16384"):
        cuda.forward(*arguments)


OUT_OF_RANGE = [*(("slots", value) for value in (9, 11, -3)), ("adapter_ids", 3), ("adapter_ids", -2)]


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("problem", ["adapters", "adapters, pre"])
@pytest.mark.parametrize("name, value", OUT_OF_RANGE)
def test_a_value_out_of_range_is_none(name, value, problem, need_x, implementation, poisoned, device):
    arguments, *grads = PROBLEMS[problem].make(torch.float32, device)
    results = []
    for written in (value, -1):
        indices = {"slots": arguments[5].clone(), "adapter_ids": torch.zeros_like(arguments[6])}
        indices[name][1:3] = written
        results.append(all_results(implementation, (*arguments[:5], *indices.values(), *arguments[7:]), *grads, need_x))
    for result, none in zip(results[0].values(), results[1].values()):
        assert result is none is None or torch.equal(result, none)


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built: no nvcc")
def test_is_registered():
    cuda_library.load_error()
    for name in ("add_layer_norm_inject", "add_layer_norm_inject_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_kernels::{name}_cuda", "CUDA")
