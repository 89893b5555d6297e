"""Every implementation that runs on this device, and ``auto``, against the formula written out token by token in
float64.
"""

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_kernels.ops import decomposed_prompt_embedding
from peft_kernels.ops.decomposed_prompt_embedding import implementations

IMPLS = ["reference", "cpp", "cuda", "auto"]  # triton is tested in another file: its interpreter is slow
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (batch, tokens, virtual tokens, rank, width, positions, adapters), offsets, adapter_ids
CASES = {
    "plain": ((3, 17, 5, 4, 32, 20, 0), None, None),
    "one-of-all": ((1, 1, 1, 1, 1, 1, 0), None, None),
    "odd-width": ((2, 13, 3, 3, 101, 13, 0), None, None),
    "wide": ((2, 30, 4, 30, 2056, 40, 0), None, None),
    "no-prompt": ((3, 9, 0, 4, 24, 9, 0), None, None),
    "no-token": ((3, 0, 5, 4, 24, 9, 0), None, None),
    "no-rank": ((2, 5, 3, 0, 16, 9, 0), None, None),
    "high-rank": ((2, 5, 1, 600, 24, 5, 0), None, None),
    "no-row": ((0, 7, 3, 2, 16, 9, 0), None, None),
    "offsets": ((4, 19, 3, 5, 48, 19, 0), [0, 3, 19, 18], None),
    "one-stacked": ((3, 11, 2, 4, 40, 15, 1), None, None),
    "adapters": ((7, 23, 6, 5, 72, 31, 4), None, [2, -1, 0, 2, 2, 3, 0]),
    "adapters-offsets": ((6, 29, 4, 3, 40, 29, 3), [0, 29, 5, 11, 28, 1], [1, 0, -1, 1, 2, 2]),
    "none": ((3, 8, 4, 3, 16, 8, 2), [1, 0, 8], [-1, -1, -1]),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every uninitialised tensor with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=IMPLS)
def impl(request, device):
    if request.param != "auto" and (
        reason := implementations.module(request.param).unavailable(device.type, torch.float32)
    ):
        pytest.skip(reason)
    return request.param


def make(case, dtype=torch.float32, device="cpu", seed=0, vocabulary=50, parameters=None):
    """ids and table; prompt, a, b; the keyword arguments."""
    (batch, length, virtual, rank, width, positions, adapters), offsets, adapter_ids = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    stack = (adapters,) if adapters else ()
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator).to(device)
    trained = [
        normal(*stack, *shape, dtype=parameters or dtype)
        for shape in ((virtual, width), (positions, rank), (rank, width))
    ]
    where = {"offsets": offsets, "adapter_ids": adapter_ids}
    where = {name: None if x is None else torch.tensor(x, dtype=torch.long, device=device) for name, x in where.items()}
    return (ids, normal(vocabulary, width)), trained, where


def by_hand(
    ids, weight, prompt, a, b, *, scale=1.0, embed_scale=1.0, offsets=None, insert_after_first=False, adapter_ids=None
):
    """The formula, one row and one token at a time; autograd computes the gradients."""
    prompt, a, b = (x if x.ndim == 3 else x[None] for x in (prompt, a, b))
    delta = scale * a @ b
    rows = []
    for i, row in enumerate(ids.tolist()):
        adapter = 0 if adapter_ids is None else int(adapter_ids[i])
        tokens = [embed_scale * weight[token] for token in row]
        if adapter >= 0:
            offset = 0 if offsets is None else int(offsets[i])
            tokens = [x + delta[adapter, j - offset] if j >= offset else x for j, x in enumerate(tokens)]
        virtual = list(prompt[adapter] if adapter >= 0 else torch.zeros_like(prompt[0]))
        first = int(insert_after_first and bool(tokens))
        rows.append(torch.stack([*tokens[:first], *virtual, *tokens[first:]]) if tokens or virtual else weight[:0])
    return torch.stack(rows) if rows else weight.new_empty(0, prompt.shape[1] + ids.shape[1], weight.shape[1])


def results(embed, table, trained, grad, trainable=True, **options):
    """Output, then the gradients of prompt, a, b and the table."""
    ids, weight = table
    leaves = [x.detach().requires_grad_() for x in trained]
    weight = weight.detach().requires_grad_(trainable)
    out = embed(ids, weight, *leaves, **options)
    if out.requires_grad:  # False for by_hand without rows
        out.backward(grad.to(out.dtype))
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in (*leaves, weight))]


def compare(embed, table, trained, **options):
    """Assert equality within rounding of plain PyTorch in the same dtype."""
    ids, weight = table
    expected = by_hand(ids, weight.double(), *(x.double() for x in trained), **options)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        weight.device, weight.dtype
    )
    truth = results(by_hand, (ids, weight.double()), [x.double() for x in trained], grad, **options)
    got = results(embed, table, trained, grad, **options)
    assert [x.dtype for x in got] == [x.dtype for x in (weight, *trained, weight)]
    assert_within_rounding(
        got, lambda: results(by_hand, (ids, weight), [x.to(weight.dtype) for x in trained], grad, **options), truth
    )
    assert got[0].is_contiguous()


def of(impl):
    return lambda *args, **kwargs: decomposed_prompt_embedding(*args, **kwargs, impl=impl)


def supports(impl, device, dtype):
    return impl == "auto" or implementations.module(impl).unavailable(device.type, dtype) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("insert_after_first", [False, True], ids=["before", "after-first"])
def test_parity(impl, case, dtype, insert_after_first, device):
    if not supports(impl, device, dtype):
        pytest.skip(f"{impl} does not take {dtype}")
    table, trained, where = make(CASES[case], dtype, device)
    compare(of(impl), table, trained, scale=0.7, embed_scale=1.6, insert_after_first=insert_after_first, **where)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("insert_after_first", [False, True], ids=["before", "after-first"])
def test_the_reference_is_the_formula(case, insert_after_first, device):
    """Compare in float64: the reference is the truth of other tests."""
    table, trained, where = make(CASES[case], torch.float64, device)
    options = {"scale": 0.7, "embed_scale": 1.6, "insert_after_first": insert_after_first, **where}
    grad = torch.randn_like(by_hand(*table, *trained, **options))
    got = results(of("reference"), table, trained, grad, **options)
    assert_within_rounding(got, lambda: results(by_hand, table, trained, grad, **options))


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


def test_strides_of_the_gradient(impl, device):
    (ids, weight), trained, where = make(CASES["adapters"], torch.float32, device)
    leaves = [x.requires_grad_() for x in trained]
    out = decomposed_prompt_embedding(ids, weight, *leaves, impl=impl, **where)
    grad = torch.randn_like(out)
    expected = WithinRounding(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    for changed in (
        grad.mT.contiguous().mT,
        grad.repeat_interleave(2, -1)[..., ::2],
        grad.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        expected.check(torch.autograd.grad(out, leaves, changed, retain_graph=True))
    summed = torch.autograd.grad(out.sum(), leaves, retain_graph=True)  # strides 0
    assert_within_rounding(summed, lambda: torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True))


def test_table_rows_more_than_2_31_elements_apart(impl, device):
    step = 2**31 // 3 + 64
    table = torch.empty(3 * step + 8, dtype=torch.bfloat16, device=device)  # untouched pages take no memory
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


def test_ten_repeats_are_bit_equal(impl, device):
    table, trained, where = make(CASES["adapters-offsets"], torch.float32, device)
    grad = torch.randn(6, 33, 40, device=device)
    first, *rest = (results(of(impl), table, trained, grad, **where) for _ in range(10))
    assert all(torch.equal(x, y) for again in rest for x, y in zip(first, again))


def test_frozen_table_and_frozen_parameters_get_nothing(impl, device):
    (ids, weight), (prompt, a, b), where = make(CASES["plain"], torch.float32, device)
    for wanted in (("prompt",), ("a",), ("b",), ("a", "b"), ("weight",), ("prompt", "weight")):
        leaves = {
            name: x.detach().requires_grad_(name in wanted)
            for name, x in zip(("weight", "prompt", "a", "b"), (weight, prompt, a, b))
        }
        decomposed_prompt_embedding(ids, impl=impl, **leaves, **where).square().sum().backward()
        assert {name for name, x in leaves.items() if x.grad is not None} == set(wanted)


def test_auto_takes_the_native_library_where_it_is_built(device):
    if device.type == "cpu":
        built = implementations.module("cpp").unavailable("cpu", torch.float32) is None
        assert implementations.choose("cpu", torch.float32) == ("cpp" if built else "reference")
        assert (
            implementations.choose("cpu", torch.float64) == implementations.choose("cpu", torch.float16) == "reference"
        )
