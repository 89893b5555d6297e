"""Every implementation that runs on this device, and ``auto``, against PyTorch's own operations in float64."""

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from test_special_tokens import CASES, IMPLS, by_hand, make
from torch.nn.functional import layer_norm, rms_norm

from peft_kernels.ops import add_inject_layer_norm, add_layer_norm_inject
from peft_kernels.ops.add_layer_norm_inject import implementations

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = {"post": add_layer_norm_inject, "pre": add_inject_layer_norm}
EPS = 1e-5


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


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def takes(impl, device, dtype):
    return impl == "auto" or implementations.module(impl).unavailable(device.type, dtype) is None


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


def results(function, floats, grads, **options):
    """Outputs, then the gradients of all inputs."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in floats]
    outs = function(*leaves, **options)
    torch.autograd.backward(outs, [g.to(outs[0].dtype) for g in grads[: len(outs)]])
    return [
        *(out.detach() for out in outs),
        *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves if x is not None),
    ]


def compare(form, impl, floats, **options):
    """Assert equality within rounding of plain PyTorch in the same dtype."""
    x = floats[0]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for _ in range(2)]
    truth = results(written_out(form), [t if t is None else t.double() for t in floats], grads, **options)
    got = results(of(form, impl), floats, grads, **options)
    assert_within_rounding(
        got,
        lambda: results(written_out(form), [t if t is None else t.to(x.dtype) for t in floats], grads, **options),
        truth,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options", [{}, {"dropout_p": 0.3, "seed": 77}, {"rms": True}], ids=["plain", "dropout", "rms"]
)
def test_parity(form, impl, case, dtype, options, device):
    if not takes(impl, device, dtype):
        pytest.skip(f"{impl} does not take {dtype}")
    floats, where = tensors(CASES[case], dtype, device)
    compare(form, impl, floats, **where, **options)


# a gradient of a single number is 0 except for rounding
@pytest.mark.parametrize("case", [name for name in CASES if name != "one of all"])
@pytest.mark.parametrize("rms", [False, True])
def test_the_reference_is_the_formula(form, case, rms, device):
    """Compare in float64: the reference is the truth of other tests."""
    floats, where = tensors(CASES[case], torch.float64, device)
    floats = [x.double() for x in floats]
    grads = [torch.randn_like(floats[0]) for _ in range(2)]
    options = {**where, "rms": rms, "dropout_p": 0.3, "seed": 77}
    got = results(of(form, "reference"), floats, grads, **options)
    assert_within_rounding(got, lambda: results(written_out(form), floats, grads, **options))


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


def test_strides_of_the_gradient(form, impl, device):
    floats, where = tensors(CASES["adapters"], torch.float32, device)
    leaves = [t.requires_grad_() for t in floats]
    outs = of(form, impl)(*leaves, **where)
    grads = [torch.randn_like(out) for out in outs]
    expected = WithinRounding(lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True))
    for change in (lambda g: g.mT.contiguous().mT, lambda g: g.transpose(0, 1).contiguous().transpose(0, 1)):
        expected.check(torch.autograd.grad(outs, leaves, [change(g) for g in grads], retain_graph=True))
    summed = torch.autograd.grad([out.sum() for out in outs], leaves, retain_graph=True)  # strides 0
    assert_within_rounding(
        summed, lambda: torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs], retain_graph=True)
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


def test_ten_repeats_are_bit_equal(form, impl, device):
    floats, where = tensors(((48, 20, 72, 3, 0), [[0, 5, 9, 19]] * 48, None), torch.float32, device)
    grads = [torch.randn_like(floats[0]) for _ in range(2)]
    first, *rest = (results(of(form, impl), floats, grads, **where, dropout_p=0.1, seed=3) for _ in range(10))
    assert all(torch.equal(x, y) for again in rest for x, y in zip(first, again))


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


def test_gradcheck(form):
    floats, where = tensors(((2, 3, 5, 2, 2), [[0, 2], [1, -1]], [1, 0]), torch.float64)
    leaves = [t.double().requires_grad_() for t in floats]
    for rms in (False, True):
        assert torch.autograd.gradcheck(
            lambda *t, rms=rms: of(form, "auto")(*t, rms=rms, dropout_p=0.2, seed=1, **where), leaves
        )


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_with_dynamic_shapes(form, impl):
    torch.compiler.reset()

    def loss(*floats, slots, adapter_ids):
        return sum(out.square().sum() for out in of(form, impl)(*floats, slots=slots, adapter_ids=adapter_ids))

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in ("plain", "rows that differ"):
        floats, where = tensors(CASES[case])

        def gradients(function, floats=floats, where=where):
            leaves = [t.detach().requires_grad_() for t in floats]
            return torch.autograd.grad(function(*leaves, **where), leaves)

        assert_within_rounding(gradients(compiled), lambda: gradients(loss))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(2, 7)}, ValueError, r"x must be \(B, S, d\), got \(2, 7\)"),
        ({"x": torch.zeros(2, 7, 32, dtype=torch.int8)}, TypeError, "x must be float32"),
        ({"residual": torch.zeros(2, 7, 31)}, ValueError, r"residual must be \(2, 7, 32\) as x is, got \(2, 7, 31\)"),
        (
            {"residual": torch.zeros(2, 7, 32).half()},
            TypeError,
            "residual must be torch.float32 as x is, got torch.float16",
        ),
        ({"residual": torch.zeros(2, 7, 32, device="meta")}, ValueError, "residual must be on cpu as x is, got meta"),
        ({"weight": torch.ones(31)}, ValueError, r"weight must be \(32,\), got \(31,\)"),
        (
            {"bias": torch.ones(32).half()},
            TypeError,
            "bias must be torch.float32 as x is, or float32, got torch.float16",
        ),
        ({"slots": None}, ValueError, "vectors and slots must come together, got vectors alone"),
        ({"vectors": None}, ValueError, "vectors and slots must come together, got slots alone"),
        ({"vectors": torch.zeros(2, 31)}, ValueError, r"vectors must be \(P, 32\)"),
        ({"slots": torch.tensor([[0, 7], [0, 0]])}, ValueError, r"slots must lie in \[-1, 7\), got values from 0 to 7"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must lie in \[0, 1\), got -0.1"),
        ({"impl": "fast"}, ValueError, "impl must be 'auto' or one of"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' cannot run here"),
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
    for changed, message in (
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
    ):
        given = [x, x, weight, None, vectors, slots, None, 1e-5, False, False, 0.0, None, True]
        for i, value in changed.items():
            given[i] = value
        with pytest.raises(RuntimeError, match=message):
            forward(*given)
    for changed, message in (
        ({2: x[:1]}, "sum must have"),
        ({4: torch.ones(5)}, "rstd must be 6"),
        ({1: x[:, :2]}, "grad_sum must have"),
    ):
        given = [x, None, x, None, torch.ones(2, 3), weight, None, None, 1]
        for i, value in changed.items():
            given[i] = value
        with pytest.raises(RuntimeError, match=message):
            backward(*given)
