"""Every implementation that runs on this device, and ``auto``, against the formula written out token by token in
float64.
"""

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from decomposed_prompt_embedding_cases import CASES, DTYPES, by_hand, compare, make, of
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import impl_fixture, skip_unless_taken

from peft_kernels.ops import decomposed_prompt_embedding
from peft_kernels.ops.decomposed_prompt_embedding import implementations

# triton is tested in another file: its interpreter is slow
impl = impl_fixture(implementations, "reference", "cpp", "cuda", "auto")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("insert_after_first", [False, True], ids=["before", "after-first"])
def test_parity(impl, case, dtype, insert_after_first, device):
    skip_unless_taken(implementations, impl, device, dtype)
    table, trained, where = make(CASES[case], dtype, device)
    compare(of(impl), table, trained, scale=0.7, embed_scale=1.6, insert_after_first=insert_after_first, **where)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("insert_after_first", [False, True], ids=["before", "after-first"])
def test_the_reference_is_the_formula(case, insert_after_first, device):
    """Compare in float64: the reference is the truth of other tests."""
    table, trained, options = make(CASES[case], torch.float64, device)
    options |= {"scale": 0.7, "embed_scale": 1.6, "insert_after_first": insert_after_first}
    compare(of("reference"), table, trained, **options)


@pytest.mark.parametrize("case", ["plain", "adapters-offsets"])
def test_float32_parameters_under_a_bfloat16_table(impl, case, device):
    table, trained, where = make(CASES[case], torch.bfloat16, device, parameters=torch.float32)
    compare(of(impl), table, trained, scale=0.7, **where)


@pytest.mark.parametrize("case", ["plain", "adapters-offsets", "odd-width"])
def test_delta_in_place_of_a_and_b(impl, case, device):
    (ids, weight), (prompt, a, b), where = make(CASES[case], torch.float32, device)
    delta = (0.7 * a @ b).requires_grad_()
    out = decomposed_prompt_embedding(ids, weight, prompt, delta=delta, impl=impl, **where)
    assert_within_rounding(out, lambda: by_hand(ids, weight, prompt, a, b, scale=0.7, **where))
    grad = torch.randn_like(out)
    twin = delta.detach().requires_grad_()
    by_reference = decomposed_prompt_embedding(ids, weight, prompt, delta=twin, impl="reference", **where)
    expected = WithinRounding(lambda: torch.autograd.grad(by_reference, twin, grad, retain_graph=True))
    expected.check(torch.autograd.grad(out, delta, grad))


def test_strides(impl, device):
    (ids, weight), trained, where = make(CASES["adapters-offsets"], torch.float32, device)
    apart = [x.repeat_interleave(3, -1)[..., 1::3] for x in (ids, weight, *trained, *where.values())]
    turned = [x if x.ndim == 1 else x.mT.contiguous().mT for x in (ids, weight, *trained, *where.values())]
    for ids, weight, prompt, a, b, offsets, adapter_ids in (apart, turned):
        compare(
            of(impl),
            (ids.int(), weight),
            (prompt, a, b),
            offsets=offsets.int(),
            adapter_ids=adapter_ids.int(),
            scale=0.3,
        )
    row = ids[:1].expand(6, -1)
    compare(of(impl), (row, weight[:1].expand(50, -1)), (prompt, a, b), **where)


@pytest.mark.large_memory
def test_table_rows_more_than_2_31_elements_apart(impl, device, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # untouched pages take no memory
    step = 2**31 // 3 + 64
    table = torch.empty(3 * step + 8, dtype=torch.bfloat16, device=device)
    weight = table.as_strided((4, 8), (step, 1))
    weight.copy_(torch.randn(4, 8))
    ids = torch.tensor([[3, 0, 2, 1]], device=device)
    prompt, a, b = (torch.randn(shape, device=device) for shape in ((2, 8), (4, 3), (3, 8)))
    out = decomposed_prompt_embedding(ids, weight, prompt, a, b, impl=impl)
    assert_within_rounding(
        out, lambda: decomposed_prompt_embedding(ids, weight.contiguous(), prompt, a, b, impl="reference")
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data, device):
    sizes = [data.draw(st.integers(low, high)) for low, high in ((0, 4), (0, 40), (0, 9), (0, 9), (1, 70))]
    batch, length, virtual, rank, width = sizes
    adapters = data.draw(st.integers(0, 3))
    rows = st.lists(st.integers(0, length), min_size=batch, max_size=batch)
    chosen = st.lists(st.integers(-1, adapters - 1), min_size=batch, max_size=batch)
    shape = (batch, length, virtual, rank, width, length + data.draw(st.integers(0, 3)), adapters)
    case = shape, data.draw(st.none() | rows), data.draw(chosen) if adapters else None
    table, trained, where = make(case, torch.float32, device, seed=data.draw(st.integers(0, 99)))
    compare(of("auto"), table, trained, scale=0.5, insert_after_first=data.draw(st.booleans()), **where)


def test_auto_takes_the_native_library_where_it_is_built(device):
    if device.type == "cpu":
        built = implementations.module("cpp").unavailable("cpu", torch.float32) is None
        assert implementations.choose("cpu", torch.float32) == ("cpp" if built else "reference")
        assert (
            implementations.choose("cpu", torch.float64) == implementations.choose("cpu", torch.float16) == "reference"
        )
