"""Every implementation that runs on this device, and ``auto``, against full logits in float64; and the operator's
contract.
"""

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_kernels.ops import label_logits
from peft_kernels.ops.label_logits import implementations

IMPLS = ["reference", "cpp", "auto"]  # triton is tested in another file: its interpreter is slow
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["max", "mean", "logsumexp"]
# (batch, tokens or 0 for (B, H), width, vocabulary), label_ids
CASES = {
    "two words": ((3, 7, 32, 50), [[4], [9]]),
    "one of all": ((1, 1, 1, 1), [[0]]),
    "odd width": ((5, 4, 101, 33), [[4, 9], [32, 0]]),
    "wide": ((2, 3, 2056, 20), [[4], [9], [1]]),
    "classes of different size": ((32, 6, 40, 30), [[4, -1, -1], [9, 3, 1], [-1, 7, -1]]),
    "shared words": ((64, 6, 40, 30), [[4, 4, 5], [5, 3, 4]]),
    "rows alone": ((6, 0, 48, 30), [[4, 8], [9, -1]]),
    "many classes": ((70, 2, 24, 400), [[3 * i, 3 * i + 1] for i in range(120)]),
    "no text": ((0, 4, 16, 9), [[1], [2]]),
    "no text, rows alone": ((0, 0, 16, 9), [[1], [2]]),
    "no class": ((3, 4, 16, 9), []),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every uninitialised tensor with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=IMPLS)
def impl(request, device):
    if request.param != "auto" and (
        reason := implementations.module(request.param).unavailable(device.type, torch.float32)
    ):
        pytest.skip(reason)
    return request.param


def takes(impl, device, dtype):
    return impl == "auto" or implementations.module(impl).unavailable(device.type, dtype) is None


def make(case, dtype=torch.float32, device="cpu", seed=0):
    """hidden, weight, label_ids, bias, positions."""
    (batch, length, width, vocabulary), label_ids = case
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*((batch, length, width) if length else (batch, width)), generator=generator).to(device, dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(device, dtype)
    bias = torch.randn(vocabulary, generator=generator).to(device, dtype)
    positions = torch.randint(length, (batch,), generator=generator).to(device) if length else None
    return (
        hidden,
        weight,
        torch.tensor(label_ids, dtype=torch.long, device=device).reshape(len(label_ids), -1 if label_ids else 1),
        bias,
        positions,
    )


def by_hand(hidden, weight, label_ids, bias=None, positions=None, reduce="max"):
    """The logits of the whole vocabulary at every token; autograd computes the gradients."""
    logits = hidden @ weight.mT if bias is None else hidden @ weight.mT + bias
    if positions is not None:
        logits = logits[torch.arange(len(hidden), device=hidden.device), positions.long()]
    of_classes = []
    for ids in label_ids.tolist():
        words = logits[:, [i for i in ids if i >= 0]]
        of_classes.append(
            {"max": lambda x: x.amax(1), "mean": lambda x: x.mean(1), "logsumexp": lambda x: x.logsumexp(1)}[reduce](
                words
            )
        )
    return torch.stack(of_classes, 1) if of_classes else logits[:, :0]


def results(function, hidden, weight, label_ids, bias, positions, grad, **options):
    """Scores, then the gradients of hidden, weight and bias."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    out = function(*leaves[:2], label_ids, bias=leaves[2], positions=positions, **options)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def compare(function, hidden, weight, label_ids, bias, positions, **options):
    """Assert equality within rounding of plain PyTorch in the same dtype."""
    shape = len(hidden), len(label_ids)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(hidden.device)
    truth = results(by_hand, hidden.double(), weight.double(), label_ids, bias.double(), positions, grad, **options)
    got = results(function, hidden, weight, label_ids, bias, positions, grad, **options)
    assert [x.dtype for x in got] == [torch.float32, hidden.dtype, weight.dtype, bias.dtype]
    assert_within_rounding(
        got, lambda: results(by_hand, hidden, weight, label_ids, bias, positions, grad, **options), truth
    )


def of(impl):
    return lambda *args, **kwargs: label_logits(*args, **kwargs, impl=impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_parity(impl, case, dtype, reduce, device):
    if not takes(impl, device, dtype):
        pytest.skip(f"{impl} does not take {dtype}")
    compare(of(impl), *make(CASES[case], dtype, device), reduce=reduce)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_formula(case, device):
    """Compare in float64: the reference is the truth of other tests."""
    given = (
        *make(CASES[case], torch.float64, device),
        torch.randn(CASES[case][0][0], len(CASES[case][1]), device=device),
    )
    for reduce in REDUCTIONS:
        got = results(of("reference"), *given, reduce=reduce)
        assert_within_rounding(got, lambda reduce=reduce: results(by_hand, *given, reduce=reduce))


def test_without_bias_and_with_one_in_float32(impl, device):
    for dtype in (t for t in DTYPES if takes(impl, device, t)):
        hidden, weight, label_ids, bias, positions = make(CASES["two words"], dtype, device)
        floats = hidden.float(), weight.float()  # scores are summed in float32
        out = label_logits(hidden, weight, label_ids, positions=positions, impl=impl)
        assert_within_rounding(out, lambda floats=floats: by_hand(*floats, label_ids, None, positions))
        wide = bias.float().requires_grad_()
        out = label_logits(hidden, weight, label_ids, bias=wide, positions=positions, impl=impl)
        assert_within_rounding(out, lambda floats=floats, wide=wide: by_hand(*floats, label_ids, wide, positions))
        out.sum().backward()
        assert wide.grad.dtype == torch.float32 and wide.grad[label_ids[:, 0]].eq(len(hidden)).all()


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


def test_strides_of_the_gradient(impl, device):
    hidden, weight, label_ids, bias, positions = make(CASES["classes of different size"], device=device)
    hidden.requires_grad_()
    out = label_logits(hidden, weight, label_ids, bias=bias, positions=positions, impl=impl)
    grad = torch.randn_like(out)
    expected = WithinRounding(lambda: torch.autograd.grad(out, hidden, grad, retain_graph=True))
    for changed in (grad.mT.contiguous().mT, grad.repeat_interleave(2, -1)[..., ::2]):
        expected.check(torch.autograd.grad(out, hidden, changed, retain_graph=True))
    summed = torch.autograd.grad(out.sum(), hidden, retain_graph=True)  # strides 0
    assert_within_rounding(summed, lambda: torch.autograd.grad(out, hidden, torch.ones_like(out), retain_graph=True))


def test_the_first_of_equal_words_takes_the_gradient(impl, device):
    hidden, weight = torch.ones(1, 4, device=device), torch.ones(3, 4, device=device, requires_grad=True)
    label_logits(hidden, weight, torch.tensor([[2, 1]], device=device), impl=impl).sum().backward()
    assert weight.grad.sum(1).tolist() == [0, 0, 4]


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


def test_ten_repeats_are_bit_equal(impl, device):
    arguments = make(CASES["many classes"], device=device)
    grad = torch.randn(70, 120, device=device)
    first, *rest = (results(of(impl), *arguments, grad, reduce="logsumexp") for _ in range(10))
    assert all(torch.equal(x, y) for again in rest for x, y in zip(first, again))


def test_frozen_tensors_get_nothing(impl, device):
    hidden, weight, label_ids, bias, positions = make(CASES["two words"], device=device)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [x.detach().requires_grad_(w) for x, w in zip((hidden, weight, bias), wanted)]
        label_logits(*leaves[:2], label_ids, bias=leaves[2], positions=positions, impl=impl).square().sum().backward()
        assert tuple(x.grad is not None for x in leaves) == wanted


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


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradcheck(reduce):
    hidden, weight, label_ids, bias, positions = make(CASES["classes of different size"], torch.float64)
    leaves = [x.detach().requires_grad_() for x in (hidden[..., :4], weight[:, :4], bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: label_logits(h, w, label_ids, bias=b, positions=positions, reduce=reduce), leaves
    )


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_with_dynamic_shapes(impl):
    torch.compiler.reset()
    label_ids = torch.tensor([[1, 2], [3, -1]])

    def loss(hidden, weight, positions):
        return (
            label_logits(hidden, weight, label_ids, positions=positions, reduce="logsumexp", impl=impl).square().sum()
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 5), (3, 9)):
        hidden, weight, positions = torch.randn(batch, length, 24), torch.randn(10, 24), torch.arange(batch)

        def gradients(function, tensors=(hidden, weight), positions=positions):
            leaves = [x.clone().requires_grad_() for x in tensors]
            return torch.autograd.grad(function(*leaves, positions), leaves)

        assert_within_rounding(gradients(compiled), lambda: gradients(loss))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": torch.zeros(7)}, ValueError, r"hidden must be \(B, S, H\) or \(B, H\), got \(7,\)"),
        ({"hidden": torch.zeros(3, 7, 32, dtype=torch.int8)}, TypeError, "hidden must be float32"),
        ({"hidden": torch.zeros(3, 32)}, ValueError, "positions must come with hidden"),
        ({"positions": None}, ValueError, "positions must come with hidden"),
        ({"weight": torch.zeros(50, 31)}, ValueError, r"weight must be \(V, 32\), got \(50, 31\)"),
        (
            {"weight": torch.zeros(50, 32).half()},
            TypeError,
            "weight must be torch.float32 as hidden is, got torch.float16",
        ),
        ({"weight": torch.zeros(50, 32, device="meta")}, ValueError, "weight must be on cpu as hidden is, got meta"),
        ({"label_ids": torch.tensor([4, 9])}, ValueError, r"label_ids must be \(C, w\)"),
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
        ({"bias": torch.zeros(49)}, ValueError, r"bias must be \(50,\), got \(49,\)"),
        (
            {"bias": torch.zeros(50).half()},
            TypeError,
            "bias must be torch.float32 as hidden is, or float32, got torch.float16",
        ),
        ({"positions": torch.tensor([0, 1])}, ValueError, r"positions must be \(3,\), got \(2,\)"),
        ({"positions": torch.tensor([0, 1, 7])}, ValueError, r"positions must lie in \[0, 7\), got values from 0 to 7"),
        (
            {"positions": torch.tensor([0, 1, -1])},
            ValueError,
            r"positions must lie in \[0, 7\), got values from -1 to 1",
        ),
        ({"reduce": "sum"}, ValueError, r"reduce must be one of \['max', 'mean', 'logsumexp'\], got 'sum'"),
        ({"impl": "fast"}, ValueError, "impl must be 'auto' or one of"),
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
    for arguments, message in (
        ((hidden.transpose(1, 2).contiguous().transpose(1, 2), weight, ids, bias, at), "dense rows"),
        ((hidden[..., :3], weight, ids, bias, at), "dense rows of 4"),
        ((hidden, weight, ids, bias, None), "hidden must be"),
        ((hidden[0], weight, ids, bias, at), "hidden must be"),
        ((hidden.bfloat16(), weight, ids, bias, at), "weight's dtype"),
        ((hidden.half(), weight.half(), ids, None, at), "float32 or bfloat16"),
        ((hidden, weight.mT.contiguous().mT, ids, bias, at), "dense rows"),
        ((hidden, weight, ids + 1, bias, at), "label_ids must lie in"),
        ((hidden, weight, ids[0], bias, at), "label_ids must be"),
        ((hidden, weight, ids.float(), bias, at), "label_ids must be int32"),
        ((hidden, weight, ids, bias[:4], at), "bias must be"),
        ((hidden, weight, ids, bias.half(), at), "bias must be float32 or bfloat16"),
        ((hidden, weight, ids, bias, at + 1), "positions must lie in"),
        ((hidden, weight, ids, bias, at[:1]), "positions must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)
    for grad in (torch.zeros(2, 1, 1), torch.zeros(2, 2), torch.zeros(2, 2, 1).double(), torch.zeros(2, 4, 1)[:, ::2]):
        with pytest.raises(RuntimeError, match="grad_words must be"):
            backward(grad, weight, ids)
