"""Every implementation that runs on this device, and ``auto``, against attention with keys and values, one row at a
time, in float64.
"""

import pytest
import torch
from accuracy import assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cross_attention_cases import CASES, by_hand, compare, make, of, ragged
from operator_cases import assert_refused, impl_fixture, skip_unless_taken

from peft_kernels.ops import label_cross_attention
from peft_kernels.ops.label_cross_attention import choose, implementations

# triton is tested in another file: its interpreter is slow
impl = impl_fixture(implementations, "reference", "explicit", "matmul", "cpp", "auto")
DTYPES = {
    "float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None), "float32 over bfloat16": (torch.bfloat16,
    torch.float32),
    "float16": (torch.float16, None),
}  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per row"])
@pytest.mark.parametrize("case", CASES)
def test_parity(impl, case, per_row, dtypes, device):
    dtype, wide = DTYPES[dtypes]
    skip_unless_taken(implementations, impl, device, dtype)
    floats, features, options = make(CASES[case], per_row, dtype, wide, device)
    compare(impl, floats, features, **options)


@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per row"])
@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_formula(case, per_row, device):
    """Compare in float64: the reference is the truth of other tests."""
    floats, features, options = make(CASES[case], per_row, torch.float64, device=device)
    compare("reference", floats, features, **options)


@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per row"])
@pytest.mark.parametrize("case", CASES)
def test_parity_of_ragged_rows(impl, case, per_row, device):
    floats, features, options = make(CASES[case], per_row, device=device)
    features, options = ragged(features, **options)
    compare(impl, floats, features, **options)


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 48, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths(impl, width, dtype, device):
    compare(impl, *make_plain((3, 5, width, 3, 1), dtype, device), num_heads=1)


@pytest.mark.parametrize("slots", [1, 2, 5, 15, 16, 17, 33, 65])
def test_numbers_of_slots(impl, slots, device):
    compare(impl, *make_plain((2, 9, 72, slots, 2), torch.float32, device), num_heads=2)


def make_plain(sizes, dtype, device):
    floats, features, _ = make((sizes, None), dtype=dtype, device=device)
    return floats, features


def test_long_widths_lose_no_digits(impl, device):
    """Scores are sums over d."""
    compare(impl, *make_plain((1, 30, 2048, 2, 2), torch.float32, device), num_heads=2)


def test_large_scores(impl, device):
    """One feature takes all the weight: the slots get no gradient, and no overflow may lose one."""
    (slots, *weights), features = make_plain((2, 9, 32, 3, 4), torch.float32, device)
    floats = [slots * 3000, *weights]
    compare(impl, floats, features, num_heads=4)


def test_strides(impl, device):
    floats, features, options = make(CASES["lengths"], True, device=device)
    for change in (
        lambda t: t.mT.contiguous().mT,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.repeat_interleave(3, -1)[..., 1::3],
        lambda t: t.repeat_interleave(2, -2)[..., ::2, :],
    ):
        compare(impl, [change(x) for x in floats], change(features), **options)
    compare(impl, floats, features[:1].expand_as(features).nan_to_num(), **options)


def test_keys_and_values_are_not_made(impl, device):
    if impl in ("reference", "explicit"):
        pytest.skip("they make them")
    floats, features, options = make(((2, 64, 256, 2, 2), None), device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        of(impl)(*(x.requires_grad_() for x in floats), features, **options)
    large = [t for t in kept if t.numel() >= features.numel() and t.data_ptr() != features.data_ptr()]
    assert all(any(t.data_ptr() == x.data_ptr() for x in floats) for t in large)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data, device):
    rows, tokens, heads, each, slots = (
        data.draw(st.integers(low, high)) for low, high in ((0, 4), (0, 12), (1, 6), (1, 24), (1, 6))
    )
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=rows, max_size=rows))
    floats, features, options = make(
        ((rows, tokens, heads * each, slots, heads), None), data.draw(st.booleans()), device=device
    )
    options["lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
    if data.draw(st.booleans()):
        features, options = ragged(features, **options)
    compare("auto", floats, features, **options)


@pytest.mark.parametrize("impl", ["auto", "reference", "explicit", "matmul"])
@pytest.mark.parametrize("form", ["full", "lengths", "offsets"])
def test_opcheck(impl, form):
    for per_row in (False, True):
        floats, features, options = make(CASES["lengths" if form != "full" else "plain"], per_row)
        lengths, offsets, heads = options["lengths"], None, options["num_heads"]
        if form == "offsets":
            features, options = ragged(features, lengths, heads)
            lengths, offsets = None, options["offsets"]
        features = features.nan_to_num()  # opcheck compares its arguments
        slots, _, w_k, w_v = (x.requires_grad_() for x in floats)
        query = slots if per_row else slots[None].detach().requires_grad_()
        operator, args = (
            torch.ops.peft_kernels.label_cross_attention.default,
            (query, features, w_k, w_v, lengths, offsets, heads),
        )
        torch.library.opcheck(operator, (*args, True, impl))
        torch.library.opcheck(
            operator, (*(x.detach() if isinstance(x, torch.Tensor) else x for x in args), False, impl)
        )
        with torch.no_grad():
            out, weights, kept = operator(*args, True, impl)
        query, w_k, w_v = query.detach(), w_k.detach(), w_v.detach()
        backward = torch.ops.peft_kernels.label_cross_attention_backward.default
        for needs in ((True, True, True), (True, False, False), (False, False, True)):
            torch.library.opcheck(
                backward, (torch.randn_like(out), query, features, w_k, w_v, weights, kept, *args[4:], *needs, impl)
            )


@pytest.mark.parametrize("impl", ["auto", "explicit", "matmul"])
def test_gradcheck(impl):
    for per_row in (False, True):
        floats, features, options = make(((3, 4, 6, 2, 2), [4, 0, 2]), per_row, torch.float64)
        floats = [x.requires_grad_() for x in floats]
        if impl == "auto":
            assert torch.autograd.gradcheck(lambda *t, f=features, o=options: of("auto")(*t, f, **o), floats)
        else:  # their softmax is in float32
            compare(impl, [x.detach().float() for x in floats], features.float(), **options)


def test_autocast(device):
    floats, features, options = make(CASES["lengths"], device=device)

    def lowered(function):
        with torch.autocast(device.type, torch.bfloat16):
            return function(*floats, features, **options)

    got = lowered(of("auto"))
    assert got.dtype == torch.float32
    truth = by_hand(*(x.double() for x in floats), features.double(), **options)
    assert_within_rounding(got, lambda: lowered(by_hand).float(), truth)


def test_auto_takes_what_is_cheaper():
    native = implementations.unavailable("cpp", "cpu", torch.float32) is None
    for queries, expected in ((48, "cpp" if native else "matmul"), (1024, "explicit"), (2000, "explicit")):
        assert choose("cpu", torch.float32, queries, 1024) == expected
    assert choose("cpu", torch.float64, 48, 1024) == "reference"
    assert choose("cpu", torch.float16, 48, 1024) == "matmul"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"features": torch.zeros(3, 32)},
            ValueError,
            r"features must be \(B, n, d\), with offsets \(total, d\), got \(3, 32\)",
        ),
        ({"features": torch.zeros(3, 7, 32, dtype=torch.int8)}, TypeError, "features must be float32"),
        ({"features": torch.zeros(3, 7, 32, requires_grad=True)}, ValueError, "features must not require a gradient"),
        ({"offsets": torch.tensor([0, 7])}, ValueError, "features must be"),
        (
            {"lengths": torch.tensor([7, 7])},
            ValueError,
            r"lengths must be \(3,\) for features \(3, 7, 32\), got \(2,\)",
        ),
        ({"lengths": torch.ones(3)}, TypeError, "lengths must be int32 or int64, got torch.float32"),
        ({"lengths": torch.tensor([7, 8, 0])}, ValueError, r"lengths must lie in \[0, 7\], got values from 0 to 8"),
        ({"lengths": torch.tensor([7, -1, 0])}, ValueError, r"lengths must lie in \[0, 7\], got values from -1 to 7"),
        (
            {"features": torch.zeros(7, 32), "offsets": torch.tensor([0, 5, 6])},
            ValueError,
            "offsets must go from 0 to 7",
        ),
        (
            {"features": torch.zeros(7, 32), "offsets": torch.tensor([0, 5, 4, 7])},
            ValueError,
            "offsets must go from 0 to 7",
        ),
        (
            {"features": torch.zeros(7, 32), "offsets": torch.zeros(0).long()},
            ValueError,
            r"offsets must be \(B \+ 1,\) for slots \(3, 32\), got \(0,\)",
        ),
        ({"lengths": torch.ones(3).long(), "offsets": torch.ones(3).long()}, ValueError, "exclude each other"),
        (
            {"slots": torch.zeros(3, 31)},
            ValueError,
            r"slots must be \(S, 32\) or \(3, S, 32\) for features \(3, 7, 32\), got \(3, 31\)",
        ),
        ({"slots": torch.zeros(2, 3, 32)}, ValueError, r"slots must be .* or \(3, S, 32\) .*, got \(2, 3, 32\)"),
        (
            {
                "slots": torch.zeros(2, 3, 32),
                "features": torch.zeros(7, 32),
                "offsets": torch.tensor([0, 3, 5, 7]),
            },
            ValueError,
            r"offsets must be \(B \+ 1,\) for slots \(2, 3, 32\), got \(4,\)",
        ),
        (
            {"features": torch.zeros(3, 7, 32).double()},
            TypeError,
            "slots must be torch.float64 like features, got torch.float32",
        ),
        (
            {"slots": torch.zeros(3, 32).half()},
            TypeError,
            "slots must be torch.float32 like features, or float32, got torch.float16",
        ),
        ({"w_k": torch.zeros(32, 16)}, ValueError, r"w_k must be \(32, 32\) for features \(3, 7, 32\), got \(32, 16\)"),
        ({"w_v": torch.zeros(32, 32).half()}, TypeError, "w_v must be torch.float32 like slots, got torch.float16"),
        ({"w_q": torch.zeros(32, 32, device="meta")}, ValueError, "w_q must be on cpu like features, got meta"),
        ({"num_heads": 5}, ValueError, "num_heads must divide d = 32, got 5"),
    ],
)
def test_errors(changed, error, message):
    (slots, *weights), features, options = make(CASES["plain"])
    given = {"slots": slots, "features": features, **dict(zip(("w_q", "w_k", "w_v"), weights)), **options} | changed
    with pytest.raises(error, match=message):
        label_cross_attention(**given)


def test_an_implementation_that_cannot_run_says_why():
    floats, features, options = make(CASES["plain"], dtype=torch.float16)
    with pytest.raises(ValueError, match="impl='cpp' cannot run here: "):
        of("cpp")(*floats, features, **options)


def test_the_native_operators_refuse_what_would_read_beyond_their_tensors():
    if reason := implementations.unavailable("cpp", "cpu", torch.float32):
        pytest.skip(reason)
    queries, features, weights = torch.zeros(2, 3, 4, 8), torch.zeros(3, 5, 8), torch.zeros(3, 5, 8)
    forward, backward = (
        torch.ops.peft_kernels.label_cross_attention_cpu,
        torch.ops.peft_kernels.label_cross_attention_backward_cpu,
    )
    assert_refused(
        forward,
        [queries, features, None, None, 1.0, True],
        ({0: queries.half()}, "queries must be float32 or bfloat16"),
        ({0: queries.bfloat16()}, "queries must be float32 or as the features are"),
        ({0: queries.mT}, "contiguous"),
        ({0: queries[:, :2].contiguous()}, "queries must have 1 row or 3"),
        ({1: features.half()}, "features must be float32 or bfloat16"),
        ({1: features[..., :7]}, "features must be"),
        ({1: features[0]}, "features must be"),
        ({2: torch.tensor([5, 6, 0])}, "lengths must lie in"),
        ({2: torch.tensor([5, 5])}, "lengths must be a CPU tensor of 3 elements"),
        ({1: features[0], 3: torch.tensor([0, 3, 2, 5])}, "offsets must not decrease"),
        ({1: features[0], 3: torch.tensor([0, 3, 4, 6])}, "offsets must go from 0 to 5"),
        ({2: torch.tensor([5, 5, 5]), 3: torch.tensor([0, 3, 4, 5])}, "features must be"),
    )
    assert_refused(
        backward,
        [queries, features, weights, None, None, 1.0, False],
        ({2: weights[:2]}, "weights must be 120"),
        ({2: weights.double()}, "weights must be"),
        ({0: queries[:, :1].contiguous()}, "3 rows"),
    )
