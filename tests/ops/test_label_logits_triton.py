"""The Triton kernels: in the interpreter without a GPU, on it with ``--device cuda``."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from against_reference import assert_like, expected_of
from label_logits_cases import CASES, compare, make, of
from special_tokens_on_gpu import DTYPES

from peft_kernels.ops import triton_runtime
from peft_kernels.ops.label_logits import reference, triton


@pytest.fixture
def impl(device):
    if reason := triton.unavailable(device.type, torch.float32):
        pytest.skip(reason)
    return "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [name for name in CASES if name != "many classes"])
def test_no_worse_than_torch(case, dtype, impl, device):
    compare(of(impl), *make(CASES[case], dtype, device), reduce="logsumexp")  # every word has a gradient


def test_ten_repeats_are_bit_equal(impl, device):
    hidden, weight, label_ids, bias, positions = make(CASES["two words"], torch.float16, device)
    grad = torch.randn(3, 2, 1, device=device)
    for backward in (False, True):
        first, *rest = (
            triton.backward(grad, weight, label_ids)
            if backward
            else triton.forward(hidden, weight, label_ids, bias, positions)
            for _ in range(10)
        )
        assert all(torch.equal(x, first) for x in rest)


def forward(impl, *arguments):
    return impl.forward(*arguments)


def backward(impl, *arguments):
    return impl.backward(*arguments)


@pytest.mark.parametrize("words", [1, 2, 3, 8, 17])
def test_a_text_is_on_its_own(words, impl, device):
    hidden, weight = torch.randn(5, 3, 67, device=device), torch.randn(40, 67, device=device)
    label_ids, positions = (
        torch.randint(-1, 40, (1, words), device=device),
        torch.tensor([2, 0, 1, 1, 2], device=device),
    )
    grad = torch.randn(5, 1, words, device=device).masked_fill(label_ids < 0, 0)
    alone = torch.cat([triton.forward(h[None], weight, label_ids, None, at[None]) for h, at in zip(hidden, positions)])
    expected_of(forward, reference, hidden, weight, label_ids, None, positions).check(alone)
    alone = torch.cat([triton.backward(g[None], weight, label_ids) for g in grad])
    expected_of(backward, reference, grad, weight, label_ids).check(alone)


def test_words_that_are_none_have_no_gradient(impl, device):
    weight, label_ids = torch.full((4, 600), torch.nan, device=device), torch.tensor([[-1, 2], [-1, -1]], device=device)
    weight[2] = 1
    grad = torch.full((3, 2, 2), torch.nan, device=device)
    grad[:, 0, 1] = 2
    assert torch.equal(triton.backward(grad, weight, label_ids), torch.full((3, 600), 2.0, device=device))


def test_rows_more_than_two_gibi_elements_apart(impl, device):
    apart = (1 << 31) + 16
    if device.type == "cpu":  # untouched pages take no memory
        memory = torch.from_numpy(np.empty(2 * apart + 64, np.float16))
    else:
        memory = torch.empty(2 * apart + 64, dtype=torch.float16, device=device)
    rows = torch.randn(3, 24, device=device).half()
    label_ids, grad = torch.tensor([[2, 0], [1, 1]], device=device), torch.randn(3, 2, 2, device=device)
    spread = memory.as_strided((3, 24), (apart, 1)).copy_(rows)
    expected_of(forward, reference, rows, rows, label_ids, None, None).check(
        triton.forward(spread, spread, label_ids, None, None)
    )
    positions = torch.tensor([2, 1, 0], device=device)
    assert_like(reference, triton, forward, spread.expand(3, 3, 24), rows, label_ids, None, positions)
    expected_of(backward, reference, grad, rows, label_ids).check(triton.backward(grad, spread, label_ids))


@pytest.mark.parametrize(
    "device_type, dtype, reason", [("cuda", torch.float64, "float64"), ("mps", torch.float32, "not mps")]
)
def test_says_why_it_cannot_run(device_type, dtype, reason):
    assert reason in triton.unavailable(device_type, dtype)


def test_refuses_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    assert "TRITON_INTERPRET" in triton.unavailable("cpu", torch.float32)
