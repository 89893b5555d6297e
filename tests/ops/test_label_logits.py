"""Every implementation that runs on this device, and ``auto``, against full logits in float64; and the operator's
contract.
"""

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from label_logits_cases import CASES, DTYPES, REDUCTIONS, by_hand, compare, make, of
from operator_cases import assert_refused, impl_fixture, skip_unless_taken

from peft_kernels.ops import label_logits
from peft_kernels.ops.label_logits import implementations

impl = impl_fixture(implementations, "reference", "cpp", "auto")
# most tests of triton are in another file: its interpreter is slow
with_triton = pytest.mark.parametrize("impl", ["reference", "cpp", "triton", "auto"], indirect=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_parity(impl, case, dtype, reduce, device):
    skip_unless_taken(implementations, impl, device, dtype)
    compare(of(impl), *make(CASES[case], dtype, device), reduce=reduce)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_formula(case, device):
    """Compare in float64: the reference is the truth of other tests."""
    for reduce in REDUCTIONS:
        compare(of("reference"), *make(CASES[case], torch.float64, device), reduce=reduce)


@with_triton
def test_without_bias_and_with_one_in_float32(impl, device):
    for dtype in DTYPES:
        if impl != "auto" and implementations.unavailable(impl, device.type, dtype):
            continue
        hidden, weight, label_ids, bias, positions = make(CASES["two words"], dtype, device)
        floats = hidden.float(), weight.float()  # scores are summed in float32
        out = label_logits(hidden, weight, label_ids, positions=positions, impl=impl)
        assert_within_rounding(out, lambda floats=floats: by_hand(*floats, label_ids, None, positions))
        wide = bias.float().requires_grad_()
        out = label_logits(hidden, weight, label_ids, bias=wide, positions=positions, impl=impl)
        assert_within_rounding(out, lambda floats=floats, wide=wide: by_hand(*floats, label_ids, wide, positions))
        out.sum().backward()
        assert wide.grad.dtype == torch.float32 and wide.grad[label_ids[:, 0]].eq(len(hidden)).all()


@with_triton
def test_reads_the_named_rows_alone(impl, device):
    hidden, weight, label_ids, bias, positions = make(CASES["classes of different size"], device=device)
    expected = WithinRounding(
        lambda: label_logits(hidden, weight, label_ids, bias=bias, positions=positions, impl=impl)
    )
    kept = hidden[torch.arange(len(hidden), device=device), positions]
    poisoned, table, biases = (torch.full_like(x, torch.nan) for x in (hidden, weight, bias))
    poisoned[torch.arange(len(hidden), device=device), positions] = kept
    used = label_ids[label_ids >= 0]
    table[used], biases[used] = weight[used], bias[used]
    expected.check(label_logits(poisoned, table, label_ids, bias=biases, positions=positions, impl=impl))
    expected.check(label_logits(kept, weight, label_ids, bias=bias, impl=impl))


@with_triton
def test_strides(impl, device):
    hidden, weight, label_ids, bias, positions = make(CASES["classes of different size"], device=device)
    apart = [x.repeat_interleave(2, -1)[..., ::2] for x in (hidden, weight, label_ids, bias, positions)]
    turned = [
        x if x.ndim == 1 else x.mT.contiguous().mT for x in (hidden, weight, label_ids.int(), bias, positions.int())
    ]
    swapped = [
        hidden.transpose(0, 1).contiguous().transpose(0, 1),
        weight.repeat(1, 2)[:, : weight.shape[1]],
        label_ids,
        bias,
        positions,
    ]
    for h, w, ids, b, at in (apart, turned, swapped):
        compare(of(impl), h, w, ids, b, at)


def test_the_first_of_equal_words_takes_the_gradient(impl, device):
    hidden, weight = torch.ones(1, 4, device=device), torch.ones(3, 4, device=device, requires_grad=True)
    label_logits(hidden, weight, torch.tensor([[2, 1]], device=device), impl=impl).sum().backward()
    assert weight.grad.sum(1).tolist() == [0, 0, 4]


@pytest.mark.large_memory
def test_tables_past_2_31_elements(impl, device, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # untouched pages take no memory
    rows, width = 2**31 // 64 + 100, 64
    weight = torch.empty(rows, width, dtype=torch.bfloat16, device=device)
    weight[-1] = 1
    hidden = torch.ones(2, width, dtype=torch.bfloat16, device=device)
    assert label_logits(hidden, weight, torch.tensor([[rows - 1]], device=device), impl=impl).flatten().tolist() == [
        64,
        64,
    ]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data, device):
    batch, length, width, vocabulary = (
        data.draw(st.integers(low, high)) for low, high in ((0, 5), (0, 6), (1, 70), (1, 20))
    )
    classes, most = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3))
    of_class = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=most)
    label_ids = [
        (ids + [-1] * most)[:most] for ids in data.draw(st.lists(of_class, min_size=classes, max_size=classes))
    ]
    compare(
        of("auto"),
        *make(((batch, length, width, vocabulary), label_ids), device=device),
        reduce=data.draw(st.sampled_from(REDUCTIONS)),
    )


# The contract


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", ["two words", "classes of different size", "rows alone"])
def test_opcheck(impl, case):
    hidden, weight, label_ids, bias, positions = make(CASES[case])
    operators = torch.ops.peft_kernels
    torch.library.opcheck(
        operators.label_logits_backward.default, (torch.randn(len(hidden), *label_ids.shape), weight, label_ids, impl)
    )
    label_ids = label_ids.clamp_min(0)  # opcheck compares gradients, and those of -inf are NaN
    trained = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    torch.library.opcheck(operators.label_logits.default, (*trained[:2], label_ids, trained[2], positions, impl))
    torch.library.opcheck(operators.label_logits.default, (hidden, weight, label_ids, None, positions, impl))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": torch.zeros(7)}, ValueError, r"hidden must be \(B, S, H\) or \(B, H\), got \(7,\)"),
        ({"hidden": torch.zeros(3, 7, 32, dtype=torch.int8)}, TypeError, "hidden must be float32"),
        ({"hidden": torch.zeros(3, 32)}, ValueError, "positions must come with hidden"),
        ({"positions": None}, ValueError, "positions must come with hidden"),
        (
            {"weight": torch.zeros(50, 31)},
            ValueError,
            r"weight must be \(V, 32\) for hidden \(3, 7, 32\), got \(50, 31\)",
        ),
        (
            {"weight": torch.zeros(50, 32).half()},
            TypeError,
            "weight must be torch.float32 like hidden, got torch.float16",
        ),
        ({"weight": torch.zeros(50, 32, device="meta")}, ValueError, "weight must be on cpu like hidden, got meta"),
        ({"label_ids": torch.tensor([4, 9])}, ValueError, r"label_ids must be \(C, w\) with w at least 1, got \(2,\)"),
        ({"label_ids": torch.zeros(2, 0, dtype=torch.long)}, ValueError, r"with w at least 1, got \(2, 0\)"),
        ({"label_ids": torch.zeros(2, 1)}, TypeError, "label_ids must be int32 or int64, got torch.float32"),
        (
            {"label_ids": torch.tensor([[4, 1], [-1, -1]])},
            ValueError,
            "label_ids must have a word for every class, got none for class 1",
        ),
        (
            {"label_ids": torch.tensor([[50], [1]])},
            ValueError,
            r"label_ids must lie in \[-1, 50\), got values from 1 to 50",
        ),
        (
            {"label_ids": torch.tensor([[4, -2], [1, 1]])},
            ValueError,
            r"label_ids must lie in \[-1, 50\), got values from -2 to 4",
        ),
        ({"bias": torch.zeros(49)}, ValueError, r"bias must be \(50,\) for weight \(50, 32\), got \(49,\)"),
        (
            {"bias": torch.zeros(50).half()},
            TypeError,
            "bias must be torch.float32 like hidden, or float32, got torch.float16",
        ),
        (
            {"positions": torch.tensor([0, 1])},
            ValueError,
            r"positions must be \(3,\) for hidden \(3, 7, 32\), got \(2,\)",
        ),
        ({"positions": torch.tensor([0, 1, 7])}, ValueError, r"positions must lie in \[0, 7\), got values from 0 to 7"),
        (
            {"positions": torch.tensor([0, 1, -1])},
            ValueError,
            r"positions must lie in \[0, 7\), got values from -1 to 1",
        ),
        ({"reduce": "sum"}, ValueError, r"reduce must be one of \['max', 'mean', 'logsumexp'\], got 'sum'"),
    ],
)
def test_errors(changed, error, message):
    hidden, weight, label_ids, bias, positions = make(CASES["two words"])
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "label_ids": label_ids,
        "bias": bias,
        "positions": positions,
    } | changed
    with pytest.raises(error, match=message):
        label_logits(**arguments)


def test_the_native_operators_refuse_what_would_read_beyond_their_tensors():
    if reason := implementations.module("cpp").unavailable("cpu", torch.float32):
        pytest.skip(reason)
    hidden, weight, ids, bias, at = (
        torch.zeros(2, 3, 4),
        torch.zeros(5, 4),
        torch.tensor([[1], [4]]),
        torch.zeros(5),
        torch.tensor([0, 2]),
    )
    forward, backward = torch.ops.peft_kernels.label_logits_cpu, torch.ops.peft_kernels.label_logits_backward_cpu
    assert_refused(
        forward,
        (hidden, weight, ids, bias, at),
        ({0: hidden.mT.contiguous().mT}, "dense rows"),
        ({0: hidden[..., :3]}, "dense rows of 4"),
        ({4: None}, "hidden must be"),
        ({0: hidden[0]}, "hidden must be"),
        ({0: hidden.bfloat16()}, "weight's dtype"),
        ({0: hidden.half(), 1: weight.half(), 3: None}, "float32 or bfloat16"),
        ({1: weight.mT.contiguous().mT}, "dense rows"),
        ({2: ids + 1}, "label_ids must lie in"),
        ({2: ids[0]}, "label_ids must be"),
        ({2: ids.float()}, "label_ids must be int32"),
        ({3: bias[:4]}, "bias must be"),
        ({3: bias.half()}, "bias must be float32 or bfloat16"),
        ({4: at + 1}, "positions must lie in"),
        ({4: at[:1]}, "positions must be"),
    )
    grad = torch.zeros(2, 2, 1)
    assert_refused(
        backward,
        (grad, weight, ids),
        *(
            ({0: x}, "grad_words must be")
            for x in (grad[:, :1], grad[..., 0], grad.double(), torch.zeros(2, 4, 1)[:, ::2])
        ),
    )
