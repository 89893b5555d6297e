"""Fixtures of all operators' tests."""

import pytest
import torch
from operator_cases import CASES, implementations_of


@pytest.fixture(autouse=True)
def poisoned(device):
    """Fill every uninitialised tensor with NaN. On a GPU, PyTorch's own operations may have no deterministic form."""
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def runs(request, device):
    """The name of a case and an implementation of its operator, which runs on this device."""
    name, impl = request.param
    if impl != "auto" and (
        reason := implementations_of(CASES[name]().package).unavailable(impl, device.type, torch.float32)
    ):
        pytest.skip(reason)
    return name, impl
