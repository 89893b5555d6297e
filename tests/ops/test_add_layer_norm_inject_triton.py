"""The Triton kernels against the reference: in the interpreter without a GPU, on it with ``--device cuda``."""

import pytest
import torch

pytest.importorskip("triton")
from add_layer_norm_inject_on_gpu import *  # noqa: F403

from peft_kernels.ops.add_layer_norm_inject import triton


@pytest.fixture
def implementation(device):
    if reason := triton.unavailable(device.type, torch.float32):
        pytest.skip(reason)
    return triton


@pytest.mark.parametrize(
    "width, rows, columns, num_warps", [(1, 32, 1, 1), (64, 32, 64, 4), (768, 2, 1024, 4), (5120, 1, 8192, 16)]
)
def test_rows_to_a_program(width, rows, columns, num_warps):
    options = triton.row_options(width)
    assert (options["BR"], options["BD"], options["num_warps"]) == (rows, columns, num_warps)
