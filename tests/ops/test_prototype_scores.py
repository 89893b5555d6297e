"""Every implementation that runs on this device, and ``auto``, against autograd in float64; and the operators'
contract.
"""

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

from peft_kernels.ops import prototype_cross_entropy, prototype_objective, prototype_scores
from peft_kernels.ops.prototype_scores import adam, implementations

IMPLS = ["reference", "cpp", "auto"]  # triton is tested in another file: its interpreter is slow
# texts, features, projected width, classes
CASES = {
    "plain": (6, 20, 16, 3),
    "one of all": (1, 1, 1, 1),
    "one class": (5, 7, 8, 1),
    "odd width": (7, 33, 101, 5),
    "as in the paper": (32, 64, 128, 2),
    "many classes": (40, 24, 32, 150),
    "many texts": (700, 8, 24, 4),
    "no text": (0, 7, 8, 3),
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


def make(case, dtype=torch.float32, device="cpu", seed=0):
    """features, projection, prototypes, radius, scores, labels."""
    texts, width, to, classes = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    labels = torch.randint(classes, (texts,), generator=generator).to(device)
    return (
        normal(texts, width),
        normal(to, width),
        normal(classes, to) / to**0.5,
        normal(classes),
        normal(texts, classes),
        labels,
    )


def by_hand(features, projection, prototypes, radius, scores=None, *, weight=1.0):
    """The formula, with an (N, C, D) temporary; autograd computes the gradients."""
    away = normalize(features @ projection.mT, dim=1)[:, None] - prototypes
    q = radius - away.norm(dim=2)
    return q if scores is None else q + weight * scores


def loss_by_hand(features, projection, prototypes, radius, scores, labels, *, weight=1.0):
    q = by_hand(features, projection, prototypes, radius, scores, weight=weight)
    return cross_entropy(q, labels) if len(labels) else q.sum()


def results(function, tensors, rest, frozen=(), **options):
    """Output, then the gradients of features, projection, prototypes and radius."""
    leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(tensors)]
    out = function(*leaves, *rest, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(grad)
    return [out.detach(), *(x.grad for i, x in enumerate(leaves) if i not in frozen)]


def compare(function, expected, tensors, rest, **options):
    """Assert equality within rounding of plain PyTorch in the same dtype."""
    wide = [x if x is None or not x.is_floating_point() else x.double() for x in rest]
    truth = results(expected, [x.double() for x in tensors], wide, **options)
    got = results(function, tensors, rest, **options)
    assert all(x.dtype == tensors[0].dtype for x in got)
    assert_within_rounding(got, lambda: results(expected, tensors, rest, **options), truth)


def of(function, impl):
    return lambda *args, **kwargs: function(*args, **kwargs, impl=impl)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_scores", [True, False])
def test_scores(impl, case, with_scores, device):
    *tensors, scores, _ = make(CASES[case], device=device)
    compare(of(prototype_scores, impl), by_hand, tensors, [scores if with_scores else None], weight=0.3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_scores", [True, False])
def test_cross_entropy(impl, case, with_scores, device):
    *tensors, scores, labels = make(CASES[case], device=device)
    rest = [scores if with_scores else None, labels]
    compare(of(prototype_cross_entropy, impl), loss_by_hand, tensors, rest, frozen=(2,), weight=0.3)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_formula(case, device):
    """Compare in float64: the reference is the truth of other tests."""
    *tensors, scores, labels = make(CASES[case], torch.float64, device)
    for function, formula, rest, frozen in (
        (prototype_scores, by_hand, [scores], ()),
        (prototype_cross_entropy, loss_by_hand, [scores, labels], (2,)),
    ):
        got = results(of(function, "reference"), tensors, rest, frozen, weight=0.3)
        assert_within_rounding(got, lambda given=(formula, tensors, rest, frozen): results(*given, weight=0.3))


@pytest.mark.parametrize("case", CASES)
def test_gradients_without_autograd(impl, case, device):
    features, projection, prototypes, radius, scores, labels = make(CASES[case], device=device)
    projected = (features @ projection.mT).requires_grad_()
    wanted = radius.clone().requires_grad_()
    got = prototype_objective(prototypes, scores, labels, weight=0.2, impl=impl)(projected, wanted)
    assert not any(x.requires_grad for x in got)

    def by_autograd():
        loss = loss_by_hand(
            projected, torch.eye(projected.shape[1], device=device), prototypes, wanted, scores, labels, weight=0.2
        )
        return (loss.detach(), *torch.autograd.grad(loss, (projected, wanted)))

    assert_within_rounding(got, by_autograd)


def test_strides(impl, device):
    *tensors, scores, labels = make(CASES["odd width"], device=device)
    apart = [x.repeat_interleave(2, -1)[..., ::2] for x in (*tensors, scores, labels)]
    turned = [x if x.ndim == 1 else x.mT.contiguous().mT for x in (*tensors, scores, labels)]
    for *tensors, scores, labels in (apart, turned):
        compare(of(prototype_scores, impl), by_hand, tensors, [scores])
        compare(of(prototype_cross_entropy, impl), loss_by_hand, tensors, [scores, labels], frozen=(2,))


def test_strides_of_the_gradient(impl, device):
    features, *rest, scores, _ = make(CASES["plain"], device=device)
    features.requires_grad_()
    q = prototype_scores(features, *rest, scores, impl=impl)
    grad = torch.randn_like(q)
    expected = WithinRounding(lambda: torch.autograd.grad(q, features, grad, retain_graph=True))
    for changed in (grad.mT.contiguous().mT, grad.repeat_interleave(2, -1)[..., ::2]):
        expected.check(torch.autograd.grad(q, features, changed, retain_graph=True))
    summed = torch.autograd.grad(q.sum(), features, retain_graph=True)  # strides 0
    assert_within_rounding(summed, lambda: torch.autograd.grad(q, features, torch.ones_like(q), retain_graph=True))


def test_no_length_and_no_distance(impl, device):
    projected = torch.tensor([[0.0, 0.0], [3.0, 4.0]], device=device, requires_grad=True)
    prototypes = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 0.0]], device=device)
    eye, radius = torch.eye(2, device=device), torch.zeros(3, device=device)
    q = prototype_scores(projected, eye, prototypes, radius, impl=impl)
    assert_within_rounding(q[0], lambda: -prototypes.norm(dim=1))
    q.sum().backward()
    assert projected.grad[0].eq(0).all() and projected.grad[1].isfinite().all()
    loss, grad, _ = prototype_objective(prototypes, None, torch.tensor([1, 0], device=device), impl=impl)(
        projected, radius
    )
    assert loss.isfinite() and grad[0].eq(0).all() and grad.isfinite().all()


def test_large_scores_do_not_overflow(impl, device):
    features, projection, prototypes, radius, scores, labels = make(CASES["plain"], device=device)
    loss = prototype_cross_entropy(features, projection, prototypes, radius, 1e4 * scores, labels, impl=impl)
    assert_within_rounding(loss, lambda: loss_by_hand(features, projection, prototypes, radius, 1e4 * scores, labels))


@settings(max_examples=40, deadline=None)
@given(
    case=st.tuples(st.sampled_from([0, 16, 23, 40]), st.integers(2, 20), st.integers(2, 40), st.integers(2, 6)),
    weight=st.floats(-2, 2),
)
def test_any_shape(case, weight, device):  # several texts: a single number of PyTorch's may be well rounded by chance
    *tensors, scores, labels = make(case, device=device)
    compare(prototype_scores, by_hand, tensors, [scores], weight=weight)
    compare(prototype_cross_entropy, loss_by_hand, tensors, [scores, labels], frozen=(2,), weight=weight)


def test_ten_repeats_are_bit_equal(impl, device):
    *tensors, scores, labels = make(CASES["many texts"], device=device)
    for function, rest, frozen in ((prototype_scores, [scores], ()), (prototype_cross_entropy, [scores, labels], (2,))):
        first, *others = (results(of(function, impl), tensors, rest, frozen) for _ in range(10))
        assert all(torch.equal(x, y) for again in others for x, y in zip(first, again))


def test_frozen_tensors_get_nothing(impl, device):
    *tensors, scores, labels = make(CASES["plain"], device=device)
    for wanted in range(4):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
        prototype_scores(*leaves, scores, impl=impl).square().sum().backward()
        assert [x.grad is not None for x in leaves] == [i == wanted for i in range(4)]
        if wanted != 2:
            leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
            prototype_cross_entropy(*leaves, scores, labels, impl=impl).backward()
            assert [x.grad is not None for x in leaves] == [i == wanted for i in range(4)]


@pytest.mark.parametrize("sizes", [[(5, 7), (3,)], [(1024, 128), (2,)], [(1,)]])
@pytest.mark.parametrize("native", [True, False])
def test_adam(sizes, native, device, monkeypatch):
    if not native:
        monkeypatch.setattr(adam.cpp, "unavailable", lambda *_: "not wanted")
    parameters = [torch.randn(size, device=device) for size in sizes]
    start = [p.clone() for p in parameters]
    steps = [
        [
            torch.randn_like(p)
            * torch.randint(-1, 2, p.shape, device=device)
            * 10.0 ** torch.randint(-6, 3, p.shape, device=device)
            for p in start
        ]
        for _ in range(20)
    ]

    def stock(dtype):
        tensors = [p.to(dtype, copy=True).requires_grad_() for p in start]
        optimizer = torch.optim.Adam(tensors, lr=0.01)
        for grads in steps:
            for p, g in zip(tensors, grads):
                p.grad = g.to(dtype)
            optimizer.step()
        return [p.detach() for p in tensors]

    ours = adam.Adam(parameters, 0.01)
    for grads in steps:
        ours.step(grads)
    assert_within_rounding(parameters, lambda: stock(torch.float32), stock(torch.float64))


# The contract


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_opcheck(impl):
    features, projection, prototypes, radius, scores, labels = make(CASES["plain"])
    operators = torch.ops.peft_kernels
    projected, trained, wanted = ((x).clone().requires_grad_() for x in (features @ projection.mT, prototypes, radius))
    torch.library.opcheck(operators.prototype_scores.default, (projected, trained, wanted, scores, 0.5, impl))
    torch.library.opcheck(operators.prototype_scores.default, (projected, trained, wanted, None, 0.5, impl))
    torch.library.opcheck(operators.prototype_scores_backward.default, (scores, projected.detach(), prototypes, impl))
    # opcheck would differentiate its gradients, which are outputs without gradients
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(
        operators.prototype_cross_entropy.default,
        (projected, prototypes, wanted, scores, 0.5, labels, impl),
        test_utils=checks,
    )


def test_gradcheck():
    *tensors, scores, labels = make(CASES["plain"], torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: prototype_scores(*x, scores, weight=0.3), leaves)
    frozen = leaves[2].detach()
    trained = leaves[0], leaves[1], leaves[3]
    assert torch.autograd.gradcheck(
        lambda f, w, r: prototype_cross_entropy(f, w, frozen, r, scores, labels, weight=0.3), trained
    )


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_with_dynamic_shapes(impl):
    torch.compiler.reset()

    def loss(features, projection, prototypes, radius, scores, labels):
        q = prototype_scores(features, projection, prototypes, radius, scores, impl=impl)
        return q.square().sum() + prototype_cross_entropy(
            features, projection, prototypes, radius, scores, labels, impl=impl
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for texts in (5, 9):
        features, projection, *rest = make((texts, 12, 8, 3))

        def gradients(function, tensors=(features, projection), rest=rest):
            leaves = [x.clone().requires_grad_() for x in tensors]
            return torch.autograd.grad(function(*leaves, *rest), leaves)

        assert_within_rounding(gradients(compiled), lambda: gradients(loss))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": torch.zeros(6)}, ValueError, r"features must be \(N, H\), got \(6,\)"),
        (
            {"features": torch.zeros(6, 20).half(), "projection": torch.zeros(16, 20).half()},
            TypeError,
            "features must be float32 or float64",
        ),
        (
            {"projection": torch.zeros(16, 21)},
            ValueError,
            r"projection must be \(D, 20\) for features \(6, 20\), got \(16, 21\)",
        ),
        (
            {"projection": torch.zeros(16, 20).double()},
            TypeError,
            "projection must be torch.float32 like features, got torch.float64",
        ),
        (
            {"prototypes": torch.zeros(3, 15)},
            ValueError,
            r"prototypes must be \(C, 16\) with C at least 1 for projection \(16, 20\), got \(3, 15\)",
        ),
        ({"prototypes": torch.zeros(0, 16)}, ValueError, r"with C at least 1 for projection \(16, 20\), got \(0, 16\)"),
        (
            {"prototypes": torch.zeros(3, 16, device="meta")},
            ValueError,
            "prototypes must be on cpu like features, got meta",
        ),
        ({"radius": torch.zeros(2)}, ValueError, r"radius must be \(3,\) for prototypes \(3, 16\), got \(2,\)"),
        (
            {"scores": torch.zeros(6, 2)},
            ValueError,
            r"scores must be \(6, 3\) for features \(6, 20\) and prototypes \(3, 16\), got \(6, 2\)",
        ),
        ({"impl": "fast"}, ValueError, "impl must be 'auto' or one of"),
        (
            {"labels": torch.zeros(5, dtype=torch.long)},
            ValueError,
            r"labels must be \(6,\) for features \(6, 20\), got \(5,\)",
        ),
        ({"labels": torch.zeros(6)}, TypeError, "labels must be int64, got torch.float32"),
        (
            {"labels": torch.tensor([0, 1, 2, 3, 0, 0])},
            ValueError,
            r"labels must lie in \[0, 3\), got values from 0 to 3",
        ),
        (
            {"labels": torch.tensor([0, 1, 2, -1, 0, 0])},
            ValueError,
            r"labels must lie in \[0, 3\), got values from -1 to 2",
        ),
    ],
)
def test_errors(changed, error, message):
    names = "features", "projection", "prototypes", "radius", "scores", "labels"
    arguments = dict(zip(names, make(CASES["plain"]))) | changed
    with pytest.raises(error, match=message):
        prototype_cross_entropy(**arguments)
    if "labels" not in changed:
        with pytest.raises(error, match=message):
            prototype_scores(**{k: v for k, v in arguments.items() if k != "labels"})


def test_errors_of_the_loss():
    features, projection, prototypes, radius, scores, labels = make(CASES["plain"])
    with pytest.raises(ValueError, match="prototypes must not require a gradient"):
        prototype_cross_entropy(features, projection, prototypes.requires_grad_(), radius, scores, labels)
    for arguments, error, message in (
        (
            (prototypes[0], scores, labels),
            ValueError,
            r"prototypes must be \(C, D\) with C at least 1, got \(16,\)",
        ),
        (
            (prototypes, scores[:5], labels),
            ValueError,
            r"scores must be \(6, 3\) for labels \(6,\) and prototypes \(3, 16\), got \(5, 3\)",
        ),
        ((prototypes.half(), None, labels), TypeError, "prototypes must be float32 or float64"),
        ((prototypes, scores.double(), labels), TypeError, "scores must be torch.float32 like prototypes"),
        ((prototypes, scores, labels.int()), TypeError, "labels must be int64"),
        ((prototypes, None, labels[:, None]), ValueError, "labels must be"),
        ((prototypes, scores, labels + 2), ValueError, r"labels must lie in \[0, 3\)"),
    ):
        with pytest.raises(error, match=message):
            prototype_objective(*arguments)
    with pytest.raises(ValueError, match="impl='cpp' cannot run here"):
        prototype_objective(prototypes.double(), scores.double(), labels, impl="cpp")


def test_the_native_operators_refuse_what_would_read_beyond_their_tensors():
    if reason := implementations.module("cpp").unavailable("cpu", torch.float32):
        pytest.skip(reason)
    operators = torch.ops.peft_kernels
    x, p, r, s, labels = (
        torch.zeros(4, 5),
        torch.zeros(3, 5),
        torch.zeros(3),
        torch.zeros(4, 3),
        torch.tensor([0, 1, 2, 0]),
    )
    for changed, message in (
        ({0: x.double()}, "projected must be"),
        ({0: x.mT.contiguous().mT}, "projected must be"),
        ({0: x[0]}, "projected must be"),
        ({1: p[:, :4]}, "prototypes must be"),
        ({2: r[:2]}, "radius must be"),
        ({3: s[:3]}, "scores must be"),
    ):
        arguments = [changed.get(i, a) for i, a in enumerate((x, p, r, s))]
        with pytest.raises(RuntimeError, match=message):
            operators.prototype_scores_cpu(*arguments, 1.0)
        with pytest.raises(RuntimeError, match=message):
            operators.prototype_cross_entropy_cpu(*arguments, 1.0, labels)
    for wrong, message in (
        (labels[:3], "labels must be"),
        (labels + 1, "labels must lie in"),
        (labels - 1, "labels must lie in"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.prototype_cross_entropy_cpu(x, p, r, s, 1.0, wrong)
    for wrong in (x[:3], x.double(), x.mT.contiguous().mT):
        with pytest.raises(RuntimeError, match="contiguous float32 CPU tensors of one size"):
            operators.prototype_adam_cpu(x, wrong, x.clone(), x.clone(), 0.1, 1)
    with pytest.raises(RuntimeError, match="step must be at least 1"):
        operators.prototype_adam_cpu(x, x.clone(), x.clone(), x.clone(), 0.1, 0)
    with pytest.raises(RuntimeError, match="grad must be"):
        operators.prototype_scores_backward_cpu(s[:, :2].contiguous(), x, p)
