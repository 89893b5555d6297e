"""Every implementation that runs on this device, and ``auto``, against PyTorch's own operations in float64."""

import against_reference
import pytest
import torch
from accuracy import assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import assert_refused, impl_fixture, skip_unless_taken
from special_tokens_cases import CASES, DTYPES, by_hand, make
from torch.nn.functional import layer_norm, rms_norm

from peft_kernels.ops import add_inject_layer_norm, add_layer_norm_inject
from peft_kernels.ops.add_layer_norm_inject import implementations

# triton is tested in another file
impl = impl_fixture(implementations, "reference", "cpp", "cuda", "auto")
FORMS = {"post": add_layer_norm_inject, "pre": add_inject_layer_norm}
EPS = 1e-5


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def tensors(case, dtype=torch.float32, device="cpu", bias=True, injects=True):
    """x, residual, weight, bias, vectors; slots and adapter_ids."""
    x, vectors, slots, adapter_ids = make(case, dtype, device)
    generator = torch.Generator().manual_seed(9)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    floats = [
        x,
        normal(*x.shape),
        1 + normal(x.shape[2]) / 4,
        normal(x.shape[2]) if bias else None,
        vectors if injects else None,
    ]
    return floats, {"slots": slots if injects else None, "adapter_ids": adapter_ids if injects else None}


def written_out(form):
    def forward(x, residual, weight, bias, vectors, *, slots, rms=False, **options):
        def inject(h):
            return h if vectors is None else by_hand(h, vectors, slots, **options)

        def norm(h):
            if not rms:
                return layer_norm(h, h.shape[2:], weight, bias, EPS)
            return rms_norm(h, h.shape[2:], weight, EPS) + (0 if bias is None else bias)

        if form == "post":
            return (inject(norm(x + residual)),)
        total = inject(x + residual)
        return norm(total), total

    return forward


def of(form, impl):
    def forward(x, residual, weight, bias, vectors, **options):
        out = FORMS[form](x, residual, weight, bias, vectors, eps=EPS, impl=impl, **options)
        return (out,) if form == "post" else out

    return forward


def compare(form, impl, floats, **options):
    """Assert equality within rounding of plain PyTorch in the same dtype."""
    against_reference.compare(of(form, impl), written_out(form), floats, **options)


# a gradient of a single number is 0 except for rounding
@pytest.mark.parametrize("case", [name for name in CASES if name != "one of all"])
@pytest.mark.parametrize("rms", [False, True])
def test_the_reference_is_the_formula(form, case, rms, device):
    """Compare in float64: the reference is the truth of other tests."""
    floats, where = tensors(CASES[case], torch.float64, device)
    compare(form, "reference", [x.double() for x in floats], **where, rms=rms, dropout_p=0.3, seed=77)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options", [{}, {"dropout_p": 0.3, "seed": 77}, {"rms": True}], ids=["plain", "dropout", "rms"]
)
def test_parity(form, impl, case, dtype, options, device):
    skip_unless_taken(implementations, impl, device, dtype)
    floats, where = tensors(CASES[case], dtype, device)
    compare(form, impl, floats, **where, **options)


@pytest.mark.parametrize(("bias", "injects"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("rms", [False, True])
def test_without_bias_or_vectors(form, impl, bias, injects, rms, device):
    floats, where = tensors(CASES["odd width"], torch.float32, device, bias, injects)
    compare(form, impl, floats, **where, rms=rms)


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 48, 63, 64, 65, 127, 129, 4099])
def test_widths(form, impl, width, device):
    floats, where = tensors(((2, 3, width, 2, 0), [[0, 2], [1, -1]], None), torch.float32, device)
    compare(form, impl, floats, **where)


def test_float32_weights_under_bfloat16(form, impl, device):
    floats, where = tensors(CASES["adapters"], torch.bfloat16, device)
    floats[2:4] = (x.float() for x in floats[2:4])
    compare(form, impl, floats, **where)


def test_a_mean_far_from_zero(form, impl, device):
    """The variance is the mean of the squared deviations, not the mean of squares minus the squared mean."""
    floats, where = tensors(CASES["odd width"], torch.float32, device)
    floats[0] = floats[0] + 3000
    compare(form, impl, floats, **where)


def test_strides(form, impl, device):
    floats, where = tensors(CASES["adapters"], torch.float32, device)
    x, residual, *rest = floats
    for change in (
        lambda t: t.mT.contiguous().mT,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.repeat_interleave(3, -1)[..., 1::3],
    ):
        compare(form, impl, [change(x), change(residual), *rest], **where)
    compare(
        form,
        impl,
        [x[:1].expand_as(x), residual, *(t if t is None else t.repeat_interleave(2, -1)[..., ::2] for t in rest)],
        **where,
    )


def test_one_of_two_results_is_enough(impl, device):
    floats, where = tensors(CASES["adapters"], torch.float32, device)
    for which in (0, 1):

        def gradients(function, which=which):
            leaves = [t.detach().requires_grad_() for t in floats]
            function(*leaves, **where)[which].square().sum().backward()
            return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]

        assert_within_rounding(gradients(of("pre", impl)), lambda: gradients(written_out("pre")))


def test_frozen_tensors_get_nothing_and_keep_nothing(form, impl, device):
    floats, where = tensors(CASES["plain"], torch.float32, device)
    names = ("x", "residual", "weight", "bias", "vectors")
    for wanted in (
        ("x",),
        ("residual",),
        ("weight",),
        ("bias",),
        ("vectors",),
        ("x", "vectors"),
        ("weight", "residual"),
    ):
        leaves = [t.detach().requires_grad_(name in wanted) for name, t in zip(names, floats)]
        sum(out.square().sum() for out in of(form, impl)(*leaves, **where)).backward()
        assert {name for name, t in zip(names, leaves) if t.grad is not None} == set(wanted)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        of(form, impl)(floats[0].requires_grad_(), *floats[1:], **where)
    large = [t for t in kept if t.numel() >= floats[0].numel()]
    assert len(large) == 1, "the sum alone"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data, device):
    batch, length, width, count = (
        data.draw(st.integers(low, high)) for low, high in ((0, 4), (0, 12), (8, 150), (1, 4))
    )
    most = data.draw(st.integers(0, 5))
    slots = [
        data.draw(st.lists(st.integers(0, length - 1), unique=True, max_size=min(most, length))) if length else []
        for _ in range(batch)
    ]
    slots = [row + [-1] * (most - len(row)) for row in slots]
    floats, _ = tensors(((batch, length, width, count, 0), [[]] * batch, None), device=device)
    slots = torch.tensor(slots, dtype=torch.int32, device=device).reshape(batch, most)
    compare(data.draw(st.sampled_from(list(FORMS))), "auto", floats, slots=slots, rms=data.draw(st.booleans()))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("pre", [False, True])
def test_opcheck(impl, rms, pre):
    floats, where = tensors(CASES["adapters"])
    leaves = [t.detach().requires_grad_() for t in floats]
    options = EPS, rms, pre, 0.1, torch.tensor([3]), True, impl
    operators = torch.ops.peft_kernels
    torch.library.opcheck(operators.add_layer_norm_inject.default, (*leaves, *where.values(), *options))
    nothing = None, None, None
    torch.library.opcheck(
        operators.add_layer_norm_inject.default, (*floats[:4], *nothing, EPS, rms, pre, 0.0, None, False, impl)
    )


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(
    "needs",
    [(True, False, False, True), (True, True, True, True), (False, True, False, False), (False, False, False, True)],
)
def test_opcheck_backward(impl, rms, needs):
    (x, residual, weight, bias, vectors), where = tensors(CASES["adapters"])
    for pre in (False, True):
        args = x, residual, weight, bias, vectors, *where.values(), EPS, rms, pre, 0.0, None, True, impl
        _, total, mean, rstd = torch.ops.peft_kernels.add_layer_norm_inject.default(*args)
        grad_sum = torch.randn_like(x) if pre else None
        backward = (
            torch.randn_like(x),
            grad_sum,
            total,
            mean,
            rstd,
            weight,
            *where.values(),
            3,
            2,
            rms,
            pre,
            0.0,
            None,
            *needs,
            impl,
        )
        torch.library.opcheck(torch.ops.peft_kernels.add_layer_norm_inject_backward.default, backward)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(2, 7)}, ValueError, r"x must be \(B, S, d\), got \(2, 7\)"),
        ({"x": torch.zeros(2, 7, 32, dtype=torch.int8)}, TypeError, "x must be float32"),
        (
            {"residual": torch.zeros(2, 7, 31)},
            ValueError,
            r"residual must be \(2, 7, 32\) for x \(2, 7, 32\), got \(2, 7, 31\)",
        ),
        (
            {"residual": torch.zeros(2, 7, 32).half()},
            TypeError,
            "residual must be torch.float32 like x, got torch.float16",
        ),
        ({"residual": torch.zeros(2, 7, 32, device="meta")}, ValueError, "residual must be on cpu like x, got meta"),
        ({"weight": torch.ones(31)}, ValueError, r"weight must be \(32,\) for x \(2, 7, 32\), got \(31,\)"),
        (
            {"bias": torch.ones(32).half()},
            TypeError,
            "bias must be torch.float32 like x, or float32, got torch.float16",
        ),
        ({"slots": None}, ValueError, "vectors and slots must come together, got vectors alone"),
        ({"vectors": None}, ValueError, "vectors and slots must come together, got slots alone"),
        ({"vectors": torch.zeros(2, 31)}, ValueError, r"vectors must be \(P, 32\)"),
        ({"slots": torch.tensor([[0, 7], [0, 0]])}, ValueError, r"slots must lie in \[-1, 7\), got values from 0 to 7"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must lie in \[0, 1\), got -0.1"),
    ],
)
def test_errors(form, changed, error, message):
    floats, where = tensors(CASES["plain"])
    with pytest.raises(error, match=message):
        FORMS[form](**dict(zip(("x", "residual", "weight", "bias", "vectors"), floats)) | where | changed)


def test_the_native_operators_refuse_what_would_read_beyond_their_tensors():
    if reason := implementations.module("cpp").unavailable("cpu", torch.float32):
        pytest.skip(reason)
    x, weight, vectors, slots = (
        torch.zeros(2, 3, 4),
        torch.ones(4),
        torch.zeros(1, 2, 4),
        torch.tensor([[0, -1], [2, 1]]),
    )
    forward, backward = (
        torch.ops.peft_kernels.add_layer_norm_inject_cpu,
        torch.ops.peft_kernels.add_layer_norm_inject_backward_cpu,
    )
    assert_refused(
        forward,
        [x, x, weight, None, vectors, slots, None, 1e-5, False, False, 0.0, None, True],
        ({0: x.half()}, "float32 or bfloat16"),
        ({0: torch.zeros(2, 4, 3).mT}, "dense rows"),
        ({1: x[:1]}, "residual must have the shape"),
        ({1: x.bfloat16()}, "residual must have the shape"),
        ({2: torch.ones(5)}, "weight must be 4"),
        ({3: torch.ones(3)}, "bias must be 4"),
        ({4: vectors[..., :3]}, "vectors must be"),
        ({5: None}, "come together"),
        ({5: slots + 1}, "slots must lie in"),
        ({6: torch.tensor([0, 1])}, "adapter_ids must lie in"),
    )
    assert_refused(
        backward,
        [x, None, x, None, torch.ones(2, 3), weight, None, None, 1],
        ({2: x[:1]}, "sum must have"),
        ({4: torch.ones(5)}, "rstd must be 6"),
        ({1: x[:, :2]}, "grad_sum must have"),
    )
