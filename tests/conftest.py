"""Fixtures and settings of all tests: the device, and no network access."""

import math
import os
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"
# read when torch is loaded: with as many workers as cores, spinning threads stall each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["PEFT_KERNELS_TUNED"] = "0"  # tests the default configs, whatever was tuned on this machine
import numpy as np
import odd_addresses
import pytest
import torch
import triton_checker
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)  # pytest --hypothesis-profile=default searches further
settings.load_profile("repeatable")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated, on the first use of impl="triton"
    if find_spec("triton"):
        triton_checker.install()


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
    triton_checker.draws = np.random.default_rng(0)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tensors live: cpu (default) or cuda")
    parser.addoption(
        "--odd-addresses",
        type=int,
        metavar="BYTES",
        help="parameters begin so many bytes after a multiple of 64 (4 or 8)",
    )
    parser.addoption(
        "--untested-transformers", action="store_true", help="pid.enable refuses no version of transformers as too new"
    )


def pytest_configure(config):
    if past := config.getoption("--odd-addresses"):
        odd_addresses.install(past)
    if config.getoption("--untested-transformers"):
        from peft_kernels.hf import names

        names.TESTED = (names.TESTED[0], (math.inf, math.inf))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") != "cpu":  # the others have nothing to do with a GPU
        elsewhere = [item for item in items if "device" not in item.fixturenames]
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if "device" in item.fixturenames]
    if find_spec("expecttest") is None:
        for item in items:
            if "opcheck" in item.name:
                item.add_marker(
                    pytest.mark.skip(reason="torch.library.opcheck imports expecttest, which is not installed")
                )


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))
