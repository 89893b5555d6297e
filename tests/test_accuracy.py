"""The bounds work: rounding on other machines passes, and wrong results fail."""

import copy

import pytest
import torch
from accuracy import Rounding, WithinRounding, assert_no_near_tie, assert_same_tokens, assert_within_rounding
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from peft_kernels.ops import label_cross_attention, shared_cross_attention

OTHERS = range(100, 120)  # seeds of roundings that are in no bound


def caught(expected, got):
    with pytest.raises(AssertionError, match="error"):
        expected.check(got)


def one_percent_off(x, i):
    y = x.clone(memory_format=torch.contiguous_format)
    y.view(-1)[i] *= 1.01
    return y


def typical(x):
    """Indices of the largest number and of the median."""
    order = x.abs().flatten().argsort()
    return order[-1], order[len(order) // 2]


class Attention:
    """shared_cross_attention of 6 decoder rows over 2 encoded inputs of 40 keys, its gradients, and the same in plain
    PyTorch.
    """

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        shapes = (6, 2, 5, 16), (2, 2, 40, 16), (2, 2, 40, 16), (6, 2, 5, 16)
        *self.tensors, self.grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    def results(self, attend, tensors=None, **options):
        leaves = [x.detach().requires_grad_() for x in tensors or self.tensors]
        out = attend(*leaves, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, self.grad.to(out.dtype))

    def expected(self):
        def plain(query, key, value):
            return scaled_dot_product_attention(query, key.repeat_interleave(3, 0), value.repeat_interleave(3, 0))

        return WithinRounding(lambda: self.results(plain), self.results(plain, [x.double() for x in self.tensors]))


@pytest.mark.parametrize("impl", ["auto", "matmul", "reference"])
def test_attention(impl):
    problem = Attention()
    expected, got = problem.expected(), problem.results(shared_cross_attention, impl=impl)
    expected.check(got)
    for i, x in enumerate(got):
        for j in typical(x):
            caught(expected, [one_percent_off(y, j) if k == i else y for k, y in enumerate(got)])
    lengths = torch.tensor([40, 39])
    # drops a key of one of two inputs
    caught(expected, problem.results(shared_cross_attention, impl=impl, key_lengths=lengths))
    for scale in (1 / 16, 0.25 * 1.001):
        caught(expected, problem.results(shared_cross_attention, impl=impl, scale=scale))


def test_attention_in_bfloat16():
    """One per cent is rounding in this dtype; a dropped key or a wrong scale is not."""
    problem = Attention(torch.bfloat16)
    expected = problem.expected()
    expected.check(problem.results(shared_cross_attention, impl="auto"))
    caught(expected, problem.results(shared_cross_attention, impl="auto", key_lengths=torch.tensor([40, 39])))
    caught(expected, problem.results(shared_cross_attention, impl="auto", scale=1 / 16))


def test_label_attention():
    generator = torch.Generator().manual_seed(0)
    slots, w_q, w_k, w_v, features = (
        torch.randn(s, generator=generator) for s in ((3, 32), (32, 32), (32, 32), (32, 32), (2, 9, 32))
    )
    w_q, w_k = w_q / 32, w_k / 32**0.5

    def plain(features=features, scale=None):
        heads = [
            x.unflatten(-1, (4, 8)).transpose(-2, -3)
            for x in (linear(slots, w_q).expand(2, -1, -1), linear(features, w_k), linear(features, w_v))
        ]
        return scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2).flatten(2)

    expected = WithinRounding(plain)
    got = label_cross_attention(slots, features, w_q, w_k, w_v, num_heads=4)
    expected.check(got)
    for j in typical(got):
        caught(expected, one_percent_off(got, j))
    caught(expected, label_cross_attention(slots, features, w_q, w_k, w_v, num_heads=4, lengths=torch.tensor([9, 8])))
    caught(expected, plain(scale=1.001 * 8**-0.5))


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 99,
    }
    config = transformers.BertConfig(
        **sizes, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.BertForMaskedLM(config).eval()


def results_of(model, mask=None):
    """Logits, loss and gradients."""
    ids = torch.randint(4, 99, (3, 11), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, labels=ids.flip(1))
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("against", ["float64", "itself"])
def test_a_model(model, against):
    truth = results_of(copy.deepcopy(model).double()) if against == "float64" else None
    expected = WithinRounding(lambda: results_of(model), truth)
    logits, loss, gradients = results_of(copy.deepcopy(model))
    expected.check((logits, loss, gradients))
    for j in typical(logits):
        caught(expected, (one_percent_off(logits, j), loss, gradients))
    caught(expected, (logits, loss * 1.0001, gradients))
    for name, gradient in gradients.items():
        if not name.endswith("key.bias"):  # it is 0 except for rounding
            caught(expected, (logits, loss, gradients | {name: one_percent_off(gradient, gradient.abs().argmax())}))
    mask = torch.ones(3, 11, dtype=torch.long)
    expected.check(results_of(model, mask))
    mask[1, 10] = 0
    caught(expected, results_of(model, mask))  # drops a key of one row
    scaled = copy.deepcopy(model)
    attention = scaled.bert.encoder.layer[1].attention.self
    with torch.no_grad():
        for p in attention.query.parameters():
            p.mul_(1.001)
    caught(expected, results_of(scaled))


@torch.no_grad()
def test_autocast(model):
    """Matmuls round to bfloat16 and nothing else does; a skipped layer exceeds that."""
    ids = torch.randint(4, 99, (3, 11), generator=torch.Generator().manual_seed(1))
    expected = WithinRounding(lambda: model(input_ids=ids).logits, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected.check(model(input_ids=ids).logits)
    shallow = copy.deepcopy(model)
    del shallow.bert.encoder.layer[2]
    caught(expected, shallow(input_ids=ids).logits)


def test_counts_do_not_round():
    """MoE experts count their tokens in floats, and their offsets are integers again."""
    experts = torch.tensor([0, 2, 2, 1, 0, 2, 2]).float()
    assert_within_rounding(torch.tensor([2, 3, 7]), lambda: experts.histc(3, 0, 2).cumsum(0, dtype=torch.int64))


def test_other_roundings_pass(model):
    """Results with twenty other roundings pass."""
    problem = Attention()
    formulas = [lambda: problem.results(shared_cross_attention, impl="reference"), lambda: results_of(model)]
    for formula in formulas:
        expected = WithinRounding(formula)
        for seed in OTHERS:
            with Rounding(seed):
                got = formula()
            expected.check(got)


def test_a_few_numbers_and_none():
    x = torch.linspace(0.1, 1, 7)
    formula = WithinRounding(lambda: (x.exp().sum(), x[:0].exp(), x * 0, x[:1].log()))
    formula.check((x.flip(0).exp().sum(), x[:0], x - x, x[:1].log()))
    caught(formula, (x.exp().sum() * 1.0001, x[:0], x * 0, x[:1].log()))
    # values that are 0 under any rounding must be 0
    caught(formula, (x.exp().sum(), x[:0], x * 0 + 1e-30, x[:1].log()))


def test_a_mean_far_from_zero():
    """Variances as differences of large squares lose digits that the formula keeps."""
    x = torch.randn(4, 64) + 300
    expected = WithinRounding(lambda: layer_norm(x, (64,)), layer_norm(x.double(), (64,)))
    expected.check((x - x.mean(1, keepdim=True)) / x.var(1, correction=0, keepdim=True).sqrt())
    caught(
        expected,
        (x - x.mean(1, keepdim=True)) / (x.square().mean(1, keepdim=True) - x.mean(1, keepdim=True).square()).sqrt(),
    )


def test_infinities_and_shapes():
    x = torch.tensor([1.0, -torch.inf, 2.0])
    assert_within_rounding(x.clone(), lambda: x * 1)
    for wrong in (
        torch.tensor([1.0, torch.inf, 2.0]),
        torch.tensor([1.0, 3.0, 2.0]),
        torch.tensor([1.0, torch.nan, 2.0]),
        x[:, None],
    ):
        with pytest.raises(AssertionError, match="finite|infinity|shape"):
            assert_within_rounding(wrong, lambda: x * 1)


def test_near_ties():
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert_no_near_tie(lambda: (x * 3).argmax(1), x.argmax(1))
    assert_same_tokens(x.argmax(1), lambda: (x * 3).argmax(1))
    with pytest.raises(AssertionError, match="expected"):
        assert_same_tokens(x.argmin(1), lambda: x.argmax(1))
    x[1, 7] = x[1].max() * (1 + 1e-7)
    with pytest.raises(AssertionError, match="near-tie"):
        for _ in range(20):
            x = x.roll(1, 1)
            assert_no_near_tie(lambda x=x: (x * 3).argmax(1), (x * 3).argmax(1))
