"""Every implementation that runs on this device, and ``auto``, against autograd in float64; and the operators'
contract.
"""

import pytest
import torch
from accuracy import assert_within_rounding
from against_reference import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import assert_refused, impl_fixture
from prototype_scores_cases import CASES, by_hand, loss_by_hand, make

from peft_kernels.ops import prototype_cross_entropy, prototype_objective, prototype_scores
from peft_kernels.ops.prototype_scores import adam, implementations

impl = impl_fixture(implementations, "reference", "cpp", "auto")
# most tests of triton are in another file: its interpreter is slow
with_triton = pytest.mark.parametrize("impl", ["reference", "cpp", "triton", "auto"], indirect=True)


def of(function, impl):
    return lambda *args, **kwargs: function(*args, **kwargs, impl=impl)


def compare_scores(impl, tensors, scores, **options):
    compare(of(prototype_scores, impl), by_hand, tensors, scores, **options)


def compare_loss(impl, tensors, scores, labels, **options):
    compare(of(prototype_cross_entropy, impl), loss_by_hand, tensors, scores, labels, frozen=(2,), **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_scores", [True, False])
def test_scores(impl, case, with_scores, device):
    *tensors, scores, _ = make(CASES[case], device=device)
    compare_scores(impl, tensors, scores if with_scores else None, weight=0.3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_scores", [True, False])
def test_cross_entropy(impl, case, with_scores, device):
    *tensors, scores, labels = make(CASES[case], device=device)
    compare_loss(impl, tensors, scores if with_scores else None, labels, weight=0.3)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_formula(case, device):
    """Compare in float64: the reference is the truth of other tests."""
    *tensors, scores, labels = make(CASES[case], torch.float64, device)
    compare_scores("reference", tensors, scores, weight=0.3)
    compare_loss("reference", tensors, scores, labels, weight=0.3)


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


@with_triton
def test_strides(impl, device):
    *tensors, scores, labels = make(CASES["odd width"], device=device)
    apart = [x.repeat_interleave(2, -1)[..., ::2] for x in (*tensors, scores, labels)]
    turned = [x if x.ndim == 1 else x.mT.contiguous().mT for x in (*tensors, scores, labels)]
    for *tensors, scores, labels in (apart, turned):
        compare_scores(impl, tensors, scores)
        compare_loss(impl, tensors, scores, labels)


@with_triton
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
    compare_scores("auto", tensors, scores, weight=weight)
    compare_loss("auto", tensors, scores, labels, weight=weight)


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
    changes = (
        ({0: x.double()}, "projected must be"),
        ({0: x.mT.contiguous().mT}, "projected must be"),
        ({0: x[0]}, "projected must be"),
        ({1: p[:, :4]}, "prototypes must be"),
        ({2: r[:2]}, "radius must be"),
        ({3: s[:3]}, "scores must be"),
    )
    assert_refused(operators.prototype_scores_cpu, (x, p, r, s, 1.0), *changes)
    assert_refused(
        operators.prototype_cross_entropy_cpu,
        (x, p, r, s, 1.0, labels),
        *changes,
        ({5: labels[:3]}, "labels must be"),
        ({5: labels + 1}, "labels must lie in"),
        ({5: labels - 1}, "labels must lie in"),
    )
    assert_refused(
        operators.prototype_adam_cpu,
        (x, x.clone(), x.clone(), x.clone(), 0.1, 1),
        *(({1: y}, "contiguous float32 CPU tensors of one size") for y in (x[:3], x.double(), x.mT.contiguous().mT)),
        ({5: 0}, "step must be at least 1"),
    )
    with pytest.raises(RuntimeError, match="grad must be"):
        operators.prototype_scores_backward_cpu(s[:, :2].contiguous(), x, p)
