"""The Triton kernels: in the interpreter without a GPU, on it with ``--device cuda``."""

import pytest
import torch

pytest.importorskip("triton")
from against_reference import assert_like

from peft_kernels.ops.prototype_scores import reference, triton


@pytest.fixture
def impl(device):
    if reason := triton.unavailable(device.type, torch.float32):
        pytest.skip(reason)
    return "triton"


def make(texts, width, classes, device):
    """projected, prototypes, radius, scores, labels; grad."""
    projected, prototypes, *rest = (
        torch.randn(*shape).to(device) for shape in ((texts, width), (classes, width), (classes,), (texts, classes))
    )
    return (projected, prototypes / width**0.5, *rest, torch.randint(classes, (texts,)).to(device)), torch.randn(
        texts, classes
    ).to(device)


def all_results(impl, arguments, grad):
    projected, prototypes, radius, scores, labels = arguments
    results = impl.forward(projected, prototypes, radius, scores, 0.3), *impl.backward(grad, projected, prototypes)
    return *results, *impl.cross_entropy(projected, prototypes, radius, scores, 0.3, labels)


@pytest.mark.parametrize("with_scores", [True, False])
@pytest.mark.parametrize(
    "texts, width, classes", [(1, 1, 1), (7, 1, 3), (67, 5, 2), (40, 128, 3), (3, 1000, 4), (2, 1100, 2), (5, 130, 11)]
)
def test_no_worse_than_torch(texts, width, classes, with_scores, impl, device):
    """Blocks with every number of rows, and partitions of the texts."""
    (projected, prototypes, radius, scores, labels), grad = make(texts, width, classes, device)
    arguments = projected, prototypes, radius, scores if with_scores else None, labels
    assert_like(reference, triton, all_results, arguments, grad)


def test_ten_repeats_are_bit_equal(impl, device):
    arguments, grad = make(67, 20, 3, device)
    first, *rest = (all_results(triton, arguments, grad) for _ in range(10))
    assert all(torch.equal(x, y) for again in rest for x, y in zip(first, again))


def test_the_loss_of_a_score_of_minus_infinity(impl, device):
    (projected, prototypes, radius, scores, labels), _ = make(6, 9, 3, device)
    scores[:2, 0], scores[2:4, 2], labels[:] = -torch.inf, -torch.inf, 1
    assert_like(
        reference,
        triton,
        lambda impl, *given: impl.cross_entropy(*given),
        projected,
        prototypes,
        radius,
        scores,
        1.0,
        labels,
    )


def test_no_texts(impl, device):
    (projected, prototypes, radius, scores, labels), grad = make(0, 9, 3, device)
    assert triton.forward(projected, prototypes, radius, scores, 1.0).shape == (0, 3)
    results = (
        *triton.backward(grad, projected, prototypes),
        *triton.cross_entropy(projected, prototypes, radius, scores, 1.0, labels),
    )
    for result, shape in zip(results, ((0, 9), (3, 9), (), (0, 9), (3,))):
        assert torch.equal(result, torch.zeros(shape, device=device))


def test_a_nan_stays_with_its_text(impl, device):
    (projected, prototypes, radius, scores, labels), _ = make(5, 9, 3, device)
    projected[2, 4] = torch.nan
    out = triton.forward(projected, prototypes, radius, scores, 1.0)
    _, grad, _ = triton.cross_entropy(projected, prototypes, radius, scores, 1.0, labels)
    for x in (out, grad):
        assert x[2].isnan().all() and x[[0, 1, 3, 4]].isfinite().all()


def test_says_why_it_cannot_run():
    assert "float16" in triton.unavailable("cuda", torch.float16)
    assert "not mps" in triton.unavailable("mps", torch.float32)
