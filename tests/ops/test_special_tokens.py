"""Every implementation that runs on this device, and ``auto``, against one row at a time in float64; and the operators'
contract.
"""

from functools import partial

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import assert_refused, impl_fixture, skip_unless_taken
from special_tokens_cases import CASES, DTYPES, by_hand, compare, in_place, make, of
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels.ops import special_token_add, special_token_add_, special_token_slots
from peft_kernels.ops.special_tokens import implementations
from peft_kernels.ops.vector_dropout import philox, threshold

# triton is tested in another file: its interpreter is slow
impl = impl_fixture(implementations, "reference", "cpp", "cuda", "auto")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", [of, in_place])
@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.3, "seed": 2**61 + 12345}], ids=["kept", "dropout"])
def test_parity(impl, case, dtype, form, dropout, device):
    skip_unless_taken(implementations, impl, device, dtype)
    hidden, vectors, slots, adapter_ids = make(CASES[case], dtype, device)
    compare(form(impl), hidden, vectors, slots, adapter_ids=adapter_ids, **dropout)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_formula(case, device):
    """Compare in float64: the reference is the truth of other tests."""
    hidden, vectors, slots, adapter_ids = make(CASES[case], torch.float64, device)
    for form in (of, in_place):
        compare(form("reference"), hidden, vectors.double(), slots, adapter_ids=adapter_ids, dropout_p=0.3, seed=5)


def test_touches_nothing_but_the_listed_rows(impl, device):
    hidden, vectors, slots, _ = make(CASES["rows that differ"], device=device)
    hidden[0, 1] = torch.nan
    out = special_token_add(hidden, vectors, slots, impl=impl)
    listed = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=device)
    for row, positions in enumerate(slots.tolist()):
        listed[row, [p for p in positions if p >= 0]] = True
    assert (
        torch.equal(out[~listed].nan_to_num(7), hidden[~listed].nan_to_num(7))
        and not (out[listed] == hidden[listed]).any()
    )
    again = hidden.clone()
    assert special_token_add_(again, vectors, slots, impl=impl) is again
    assert_within_rounding(again, lambda: by_hand(hidden, vectors, slots))


def test_strides(impl, device):
    hidden, vectors, slots, adapter_ids = make(CASES["adapters"], device=device)
    expected = WithinRounding(partial(by_hand, hidden, vectors, slots, adapter_ids=adapter_ids))
    apart = [x.repeat_interleave(2, -1)[..., ::2] for x in (hidden, vectors, slots.long(), adapter_ids.int())]
    turned = [x if x.ndim == 1 else x.mT.contiguous().mT for x in (hidden, vectors, slots, adapter_ids)]
    swapped = [hidden.transpose(0, 1).contiguous().transpose(0, 1), vectors, slots, adapter_ids]
    for hidden, vectors, slots, adapter_ids in (apart, turned, swapped):
        compare(of(impl), hidden, vectors, slots, adapter_ids=adapter_ids)
        strides = hidden.stride()
        special_token_add_(hidden, vectors, slots, adapter_ids=adapter_ids, impl=impl)
        expected.check(hidden)
        assert hidden.stride() == strides


@pytest.mark.large_memory
def test_rows_more_than_2_31_elements_apart(impl, device, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # untouched pages take no memory
    step = 2**31 // 3 + 64
    hidden = torch.empty(3 * step + 8, dtype=torch.bfloat16, device=device).as_strided((4, 1, 8), (step, 8, 1)).zero_()
    vectors = torch.randn(1, 8, device=device).bfloat16().float()
    special_token_add_(hidden, vectors, torch.zeros(4, 1, dtype=torch.int32, device=device), impl=impl)
    assert torch.equal(hidden.float(), vectors.expand(4, 1, 8))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data, device):
    batch, length, width, count = (
        data.draw(st.integers(low, high)) for low, high in ((0, 4), (0, 12), (1, 70), (1, 4))
    )
    adapters, most = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5))
    slots = [
        data.draw(st.lists(st.integers(0, length - 1), unique=True, max_size=min(most, length))) if length else []
        for _ in range(batch)
    ]
    slots = [row + [-1] * (most - len(row)) for row in slots]
    chosen = data.draw(st.lists(st.integers(-1, adapters - 1), min_size=batch, max_size=batch)) if adapters else None
    hidden, vectors, _, adapter_ids = make(
        ((batch, length, width, count, adapters), [[]] * batch, chosen), device=device
    )
    dropout = {
        "dropout_p": data.draw(st.sampled_from([0.0, 0.1, 0.9])),
        "seed": data.draw(st.integers(-(2**63), 2**63 - 1)),
    }
    slots = torch.tensor(slots, dtype=torch.int32, device=device).reshape(batch, most)
    compare(of("auto"), hidden, vectors, slots, adapter_ids=adapter_ids, **dropout)


def test_in_place_without_gradients_and_on_a_leaf(impl, device):
    hidden, vectors, slots, _ = make(CASES["plain"], device=device)
    assert not special_token_add_(hidden, vectors, slots, impl=impl).requires_grad
    with torch.no_grad():
        assert not special_token_add_(hidden, vectors.requires_grad_(), slots, impl=impl).requires_grad
    with pytest.raises(RuntimeError, match="leaf"):
        special_token_add_(hidden.requires_grad_(), vectors, slots, impl=impl)


# Dropout


def test_philox_is_the_published_generator():
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox(zero, zero, zero, zero).item() == 0x6627E8D5  # Random123's known answers


def test_dropout_keeps_the_expectation_and_repeats(impl, device):
    hidden, vectors = torch.zeros(64, 3, 256, device=device), torch.ones(2, 256, device=device)
    slots = torch.tensor([[0, 2]], device=device).expand(64, 2)
    out = special_token_add(hidden, vectors, slots, dropout_p=0.25, seed=5, impl=impl)
    taken = out[:, [0, 2]]
    assert set(taken.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(taken.mean().item() - 1) < 5 * (0.25 / 0.75 / taken.numel()) ** 0.5
    assert torch.equal(out, special_token_add(hidden, vectors, slots, dropout_p=0.25, seed=5, impl=impl))
    assert not torch.equal(out, special_token_add(hidden, vectors, slots, dropout_p=0.25, seed=6, impl=impl))
    kept = taken.flatten(1).unique(dim=0)
    assert len(kept) == 64, "rows must draw apart"
    assert not torch.equal(taken[:, 0], taken[:, 1]), "occurrences must draw apart"


def test_seed_none_draws_from_torch(impl, device):
    hidden, vectors, slots, _ = make(CASES["plain"], device=device)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(special_token_add(hidden, vectors, slots, dropout_p=0.5, impl=impl))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    given_seed = torch.tensor([9], device=device)
    by_tensor, by_number = (
        special_token_add(hidden, vectors, slots, dropout_p=0.5, seed=s, impl=impl) for s in (given_seed, 9)
    )
    assert torch.equal(by_tensor, by_number)


def test_threshold_fits_32_bits():
    assert threshold(0.5) == 2**31 and threshold(1 - 2**-40) == 2**32 - 1


# Slots


def slots_by_hand(input_ids, special_ids, max_slots, mask=None):
    rows = []
    for b, row in enumerate(input_ids.tolist()):
        found = [s for s, token in enumerate(row) if token in special_ids and (mask is None or bool(mask[b, s]))]
        rows.append(found + [-1] * (max_slots - len(found)))
    return torch.tensor(rows, dtype=torch.int32).reshape(len(input_ids), max_slots)


@pytest.mark.parametrize("shape", [(3, 17), (1, 1), (5, 300), (2, 0), (0, 4), (70, 3)])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_slots(impl, shape, masked, dtype, device):
    ids = torch.randint(0, 9, shape).to(device, dtype)
    mask = None if masked is None else torch.randint(0, 2, shape).to(device, masked)
    got = special_token_slots(ids, [1, 5, 7], max_slots=shape[1] + 2, attention_mask=mask, impl=impl)
    assert got.dtype == torch.int32 and torch.equal(got.cpu(), slots_by_hand(ids, [1, 5, 7], shape[1] + 2, mask))
    apart = ids.repeat_interleave(2, 1)[:, ::2], None if mask is None else mask.T.contiguous().T
    special = torch.tensor([1, 0, 5, 0, 7], device=device, dtype=torch.int32)[::2]
    assert torch.equal(
        special_token_slots(apart[0], special, max_slots=shape[1] + 2, attention_mask=apart[1], impl=impl), got
    )


def test_too_many_special_tokens(impl, device):
    if device.type != "cpu":
        pytest.skip("on a GPU this is an assertion on the device, which ends the process")
    ids = torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert torch.equal(
        special_token_slots(ids, [1], max_slots=3, impl=impl), torch.tensor([[0, -1, -1], [0, 1, 2]], dtype=torch.int32)
    )
    with pytest.raises(ValueError, match="max_slots=2, but row 1 has 3 special tokens"):
        special_token_slots(ids, [1], max_slots=2, impl=impl)
    assert special_token_slots(ids, [4], max_slots=0, impl=impl).shape == (2, 0)


def test_no_special_ids(impl, device):
    assert (
        special_token_slots(torch.zeros(2, 3, dtype=torch.long, device=device), [], max_slots=2, impl=impl) == -1
    ).all()


# The contract


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", ["plain", "adapters", "no slot"])
def test_opcheck(impl, case):
    hidden, vectors, slots, adapter_ids = make(CASES[case])
    vectors = vectors if vectors.ndim == 3 else vectors[None]
    seed = torch.tensor([3])
    operators = torch.ops.peft_kernels
    torch.library.opcheck(
        operators.special_token_slots.default, (torch.randint(0, 4, (2, 5)), torch.tensor([1]), None, 5, impl)
    )
    trained = hidden.clone().requires_grad_(), vectors.clone().requires_grad_()
    torch.library.opcheck(operators.special_token_add.default, (*trained, slots, 0.1, seed, adapter_ids, impl))
    torch.library.opcheck(
        operators.special_token_add_.default, (hidden.clone(), vectors, slots, 0.1, seed, adapter_ids, impl)
    )
    torch.library.opcheck(
        operators.special_token_add_backward.default, (hidden, slots, *vectors.shape[:2], 0.1, seed, adapter_ids, impl)
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 7)}, ValueError, r"hidden must be \(B, S, d\), got \(2, 7\)"),
        ({"hidden": torch.zeros(2, 7, 32, dtype=torch.int8)}, TypeError, "hidden must be float32"),
        (
            {"vectors": torch.zeros(2, 31)},
            ValueError,
            r"vectors must be \(P, 32\) or \(K, P, 32\) with P at least 1 for hidden \(2, 7, 32\), got \(2, 31\)",
        ),
        ({"vectors": torch.zeros(0, 32)}, ValueError, r"with P at least 1 for hidden \(2, 7, 32\), got \(0, 32\)"),
        (
            {"vectors": torch.zeros(2, 32).half()},
            TypeError,
            "vectors must be torch.float32 like hidden, or float32, got torch.float16",
        ),
        ({"vectors": torch.zeros(3, 2, 32)}, ValueError, "adapter_ids must select among the 3 adapters"),
        ({"vectors": torch.zeros(2, 32, device="meta")}, ValueError, "vectors must be on cpu like hidden, got meta"),
        (
            {"slots": torch.zeros(3, 2, dtype=torch.int32)},
            ValueError,
            r"slots must be \(2, k\) for hidden \(2, 7, 32\), got \(3, 2\)",
        ),
        ({"slots": torch.zeros(2, 2)}, TypeError, "slots must be int32 or int64, got torch.float32"),
        ({"slots": torch.tensor([[0, 7], [0, 0]])}, ValueError, r"slots must lie in \[-1, 7\), got values from 0 to 7"),
        (
            {"slots": torch.tensor([[0, -2], [0, 0]])},
            ValueError,
            r"slots must lie in \[-1, 7\), got values from -2 to 0",
        ),
        (
            {"adapter_ids": torch.tensor([0])},
            ValueError,
            r"adapter_ids must be \(2,\) for hidden \(2, 7, 32\), got \(1,\)",
        ),
        ({"adapter_ids": torch.tensor([0, 1])}, ValueError, r"adapter_ids must lie in \[-1, 1\)"),
        ({"adapter_ids": torch.zeros(2)}, TypeError, "adapter_ids must be int32 or int64"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
        (
            {"dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.long)},
            ValueError,
            "seed must be a number or one int64",
        ),
    ],
)
@pytest.mark.parametrize("add", [special_token_add, special_token_add_])
def test_errors(changed, error, message, add):
    hidden, vectors, slots, _ = make(CASES["plain"])
    arguments = {"hidden": hidden, "vectors": vectors, "slots": slots} | changed
    with pytest.raises(error, match=message):
        add(**arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, ValueError, r"input_ids must be \(B, S\), got \(3,\)"),
        ({"input_ids": torch.zeros(3, 2)}, TypeError, "input_ids must be int32 or int64"),
        ({"special_ids": torch.zeros(2, 2, dtype=torch.long)}, ValueError, r"special_ids must be \(n,\)"),
        ({"special_ids": torch.zeros(2)}, TypeError, "special_ids must be int32 or int64"),
        (
            {"attention_mask": torch.ones(2, 3)},
            ValueError,
            r"attention_mask must be \(2, 4\) for input_ids \(2, 4\), got \(2, 3\)",
        ),
        ({"attention_mask": torch.ones(2, 4, device="meta")}, ValueError, "attention_mask must be on cpu"),
        ({"max_slots": -1}, ValueError, "max_slots must be at least 0, got -1"),
    ],
)
def test_errors_of_slots(changed, error, message):
    arguments = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "special_ids": [1], "max_slots": 2} | changed
    with pytest.raises(error, match=message):
        special_token_slots(**arguments)


def test_the_native_operators_refuse_what_would_read_beyond_their_tensors():
    if reason := implementations.module("cpp").unavailable("cpu", torch.float32):
        pytest.skip(reason)
    hidden, vectors, slots = torch.zeros(2, 3, 4), torch.zeros(1, 2, 4), torch.tensor([[0, -1], [2, 1]])
    add, backward = torch.ops.peft_kernels.special_token_add_cpu, torch.ops.peft_kernels.special_token_add_backward_cpu
    assert_refused(
        add,
        (hidden, vectors, slots, 0.0, None, None),
        ({0: hidden.mT}, "dense rows"),
        ({0: hidden.half()}, "float32 or bfloat16"),
        ({1: vectors[..., :3]}, "vectors must be"),
        ({2: slots + 1}, "slots must lie in"),
        ({2: slots[:1]}, "slots must be"),
        ({3: 0.5}, "seed must be"),
        ({5: torch.tensor([0, 1])}, "adapter_ids must lie in"),
    )
    with pytest.raises(RuntimeError, match="at least one row"):
        backward(hidden, slots, 1, 0, 0.0, None, None)
    with pytest.raises(RuntimeError, match="bool CPU tensor"):
        torch.ops.peft_kernels.special_token_slots_cpu(slots, torch.tensor([1]), torch.ones(2, 1, dtype=torch.bool), 2)


def test_a_list_of_ids_is_copied_without_waiting_for_the_device():
    class Copies(TorchDispatchMode):
        blocking = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                self.blocking.append(not kwargs.get("non_blocking"))
            return function(*args, **(kwargs or {}))

    with Copies() as copies:
        special_token_slots(torch.zeros(2, 3, dtype=torch.long, device="meta"), [1, 2], max_slots=2)
    assert copies.blocking == [False]
