"""The checks of ``triton_checker.py`` notice faults that are planted in our kernels; its bfloat16 is PyTorch's."""

import inspect
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
import triton_checker
from layouts import column, laid_out, recorded_calls
from operator_cases import CASES, expected_of, run

from peft_kernels.ops import triton_runtime
from peft_kernels.ops.registry import declared

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is no interpreter to check")

OFF_BY_ONE = "o_slot * 0 - 1, mask=o_slot < max_slots", "o_slot * 0 - 1, mask=o_slot <= max_slots"
SHARED_ROW = "item = (tl.program_id(0) // tiles)", "item = (tl.program_id(0) // tiles // 2)"
NO_OTHER = "stride_hd, mask=o_d < d, other=0.0)", "stride_hd, mask=o_d < d)"
NO_STRIDE = "adapter_ids + o_row.to(tl.int64) * stride_k", "adapter_ids + o_row"
PAST_END = "range(0, specials)", "range(0, specials + 1)"
STORE_LOGITS = "tl.store(out + text * words + o_w"
READS_ANOTHER = STORE_LOGITS, f"b_out += tl.load(out + (text + 1) % 3 * words)\n    {STORE_LOGITS}"
LANES_MEET = STORE_LOGITS, STORE_LOGITS + " // 2"
FAULTS = {
    "a mask that is off by one": ("special_token_slots", OFF_BY_ONE, "outside of|write the same element"),
    "two programs that own one row": ("special_token_add", SHARED_ROW, "write the same element"),
    "a load without other": ("label_logits", NO_OTHER, "finite where it should not be"),
    "a stride taken for 1": ("special_token_add", NO_STRIDE, r"outside of int64\[3\] .* at element 1"),
    "a read past the end": ("special_token_slots", PAST_END, r"outside of int64\[3\] .* at element 9"),
    "a read of another program's result": ("label_logits", READS_ANOTHER, "reads what program . writes"),
    "lanes with one address": ("label_logits", LANES_MEET, "two lanes of a store"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, device, tmp_path, monkeypatch):
    name, (code, planted), message = FAULTS[fault]
    case = CASES[name]()
    launcher = import_module(f"peft_kernels.ops.{case.package}.triton")
    case = laid_out(case, column, torch.int64, device)
    expected = expected_of(name, case)
    expected.check(run(name, "triton", case))

    source = inspect.getsource(launcher.triton_kernels)
    assert code in source
    file = tmp_path / "planted_kernels.py"
    file.write_text(source.replace(code, planted))
    spec = spec_from_file_location(f"peft_kernels.ops.{case.package}.planted_kernels", file)
    kernels = module_from_spec(spec)
    spec.loader.exec_module(kernels)
    monkeypatch.setattr(launcher, "triton_kernels", kernels)
    with pytest.raises(AssertionError, match=message):
        expected.check(run(name, "triton", case))


@triton.jit
def bfloat16_kernel(out, x, y, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x, b_y = tl.load(x + o), tl.load(y + o)
    tl.store(out + o, b_x + b_y * b_x)
    tl.store(out + N + o, b_x / b_y - tl.abs(-b_x))
    tl.store(out + 2 * N + o, tl.where(b_x < b_y, b_x, tl.maximum(b_y, 0.1)))
    tl.store(out + 3 * N + o, tl.exp(b_x.to(tl.float32)).to(tl.bfloat16))
    tl.store(out + 4 * N + o, (b_x.to(tl.int16, bitcast=True) ^ 1).to(tl.bfloat16, bitcast=True))
    b_whole = (b_y.to(tl.float32) * 100).to(tl.int32)
    tl.store(out + 5 * N + o, b_x.to(tl.float16).to(tl.bfloat16) + b_whole.to(tl.bfloat16))
    tl.store(out + 6 * N + o, tl.sum(b_x[:, None] * b_y[None, :], 1).to(tl.bfloat16))
    tl.store(out + 7 * N + o, tl.sum(tl.dot(b_x[:, None], b_y[None, :]), 1))
    tl.store(out + 8 * N + o, tl.load(x + o, mask=b_y > 0, other=3.14159))
    tl.store(out + 9 * N + o, tl.load(x + o, mask=b_y > 0))


def test_bfloat16_is_that_of_torch():
    x, y = torch.randn(2, 32).bfloat16()
    out = torch.empty(10, 32, dtype=torch.bfloat16)
    bfloat16_kernel[1,](out, x, y, N=32)
    outer = x[:, None].float() * y
    expected = [
        x + y * x, x.float() / y - x.abs(), torch.where(x < y, x, y.clamp_min(0.1)), x.float().exp().bfloat16(),
        (x.view(torch.int16) ^ 1).view(torch.bfloat16), x.half().bfloat16() + (y.float() * 100).int().bfloat16(),
        (x[:, None] * y).float().sum(1), outer.sum(1), torch.where(y > 0, x, 3.14159), torch.where(y > 0, x, torch.nan),
    ]  # fmt: skip
    for i, (row, by_torch) in enumerate(zip(out, expected)):
        same = row.view(torch.int16) == by_torch.bfloat16().view(torch.int16)
        assert (same | row.isnan() & by_torch.isnan()).all(), i


def test_without_the_checker_the_interpreter_refuses_bfloat16(monkeypatch):
    monkeypatch.setattr(triton_runtime, "INTERPRETED_DTYPES", triton_runtime.INTERPRETED_DTYPES[:2])
    assert "wrong in bfloat16" in triton_runtime.unavailable("cpu", torch.bfloat16)
    assert triton_runtime.unavailable("cpu", torch.float16) is None


def test_every_kernel_runs_checked(device, monkeypatch):
    """Each operator's case, forward and backward, launches all of its kernels."""
    launched = set()
    finish = triton_checker.Launch.finish
    monkeypatch.setattr(triton_checker.Launch, "finish", lambda self: launched.add(self.kernel) or finish(self))
    attention = import_module("peft_kernels.ops.shared_cross_attention.triton")
    monkeypatch.setattr(attention, "num_splits", lambda programs, n, processors: 2)
    for name, case in CASES.items():
        run(name, "triton", laid_out(case(), column, torch.int64, device))
    kernels = [kernel for module in declared("variants").values() for kernel in module.KERNELS.values()]
    assert launched == {kernel.__name__ for kernel in kernels}


@pytest.mark.parametrize("shift", [1, 10**6, -(10**6)])
@pytest.mark.parametrize("name", CASES)
def test_no_value_leads_out_of_bounds(name, shift, device, monkeypatch):
    """Without PEFT_KERNELS_DEBUG=1 a GPU checks no values: results may be wrong, but no other memory is touched."""
    case = CASES[name]()
    for function, arguments in recorded_calls(name, "triton", case, device, monkeypatch):
        for i, x in enumerate(arguments):
            if isinstance(x, torch.Tensor) and x.dtype == torch.int32:
                for wrong in (x + shift, torch.where(x == x.amax(), x + shift, x)):
                    function(*arguments[:i], wrong, *arguments[i + 1 :])


def test_values_out_of_range_count_as_none(device):
    """Slots, adapters and labels count as -1, ids as the last one, offsets and lengths as n; positions give NaN."""
    kernels = {name: import_module(f"peft_kernels.ops.{name}.triton") for name in declared("variants")}
    hidden, vectors, slots = torch.randn(3, 6, 20), torch.randn(2, 2, 20), torch.tensor([[0, 6], [2, 99], [1, -1]])
    sums = []
    for positions, adapters in ((slots, [1, 2, 0]), (slots.where(slots < 6, -1), [1, -1, 0])):
        out = hidden.clone()
        kernels["special_tokens"].add_(out, vectors, positions, 0.0, None, torch.tensor(adapters))
        sums.append((out, kernels["special_tokens"].backward(out, positions, 2, 2, 0.0, None, torch.tensor(adapters))))
    for wrong, right in zip(*sums):
        assert torch.equal(wrong, right)

    weight, label_ids = torch.randn(9, 20), torch.tensor([[3, 9]])
    logits = kernels["label_logits"].forward(hidden, weight, label_ids, None, torch.tensor([0, 6, -1]))
    assert logits[:, 0, 1].eq(-torch.inf).all() and logits[:, 0, 0].isnan().tolist() == [False, True, True]
    rows = weight, torch.randn(1, 2, 20), None, None, torch.randn(1, 3, 20), 1.0, 1.0
    embed = kernels["decomposed_prompt_embedding"].forward
    wrong = embed(torch.tensor([[3, 9, -1]] * 3), *rows, torch.tensor([0, 4, -1]), False, torch.tensor([1, 0, 0]))
    right = embed(torch.tensor([[3, 8, 8]] * 3), *rows, torch.tensor([0, 3, 3]), False, torch.tensor([-1, 0, 0]))
    assert torch.equal(wrong, right)

    query, key = torch.randn(2, 1, 3, 16), torch.randn(2, 1, 7, 16)
    lengths = [torch.tensor(x) for x in ([8, 4], [7, 4])]
    wrong, right = (kernels["shared_cross_attention"].forward(query, key, key, x, None, 0.25)[0] for x in lengths)
    assert torch.equal(wrong, right)
    features, queries = torch.randn(2, 7, 16), torch.randn(1, 1, 3, 16)
    wrong, right = (kernels["label_cross_attention"].pool(queries, features, x, None, 0.25, False)[0] for x in lengths)
    assert torch.equal(wrong, right)
