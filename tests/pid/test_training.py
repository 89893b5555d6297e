"""N labelled streams on b encoded inputs: the loss and every gradient equal those of inputs repeated N / b times."""

import copy

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from models import EOS, TEXT_FAMILIES, VOCAB, build, inputs, start_of
from torch.nn import functional as F

from peft_kernels import pid

UNIFORM, RAGGED = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 1, 2])


def labels_of(rows, length=5):
    labels = torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(8))
    labels[1::2, length - 2 :] = -100
    return labels


def step(model, x, **kwargs):
    """Loss, logits and gradients by name."""
    model.zero_grad(set_to_none=True)
    out = model(**x, labels=kwargs.pop("labels", None), **kwargs)
    out.loss.backward()
    return (
        out.loss.detach(),
        out.logits.detach(),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


def assert_like_repeated(model, x, index, **kwargs):
    """Assert that loss, logits and every gradient equal stock's on repeated inputs, in float64 and in float32."""
    stock, labels = copy.deepcopy(model), labels_of(len(index))
    pid.enable(model)
    repeated, extra = {k: v[index] for k, v in x.items()}, {} if index is UNIFORM else {"encoder_index": index}
    kwargs["labels"] = labels
    for dtype in (torch.float64, torch.float32):
        stock.to(dtype), model.to(dtype)
        assert_within_rounding(step(model, x, **extra, **kwargs), lambda: step(stock, repeated, **kwargs))


@pytest.mark.parametrize("mask", ["right", "left", "holes", "full"])
@pytest.mark.parametrize("index", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_gradients_are_those_of_repeated_inputs(family, index, mask):
    assert_like_repeated(build(family).train(), inputs(mask=mask), index)


@pytest.mark.parametrize("index", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_eager_attention(family, index):
    assert_like_repeated(build(family, "eager").train(), inputs(), index)


def checkpointed(family, reentrant):
    model = build(family).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("index", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("family", [f for f in TEXT_FAMILIES if f != "umt5"])
def test_gradient_checkpointing(family, index, reentrant):
    assert_like_repeated(checkpointed(family, reentrant), inputs(), index, use_cache=False)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_two_checkpointed_forwards_before_a_backward(family, reentrant):
    """A layer that runs again must use the values of its own forward, not of the latest one."""
    model = checkpointed(family, reentrant)
    first, second = inputs(3, seed=1), inputs(2, 7, "left", seed=2)
    calls = [(first, torch.tensor([0, 0, 0, 2]), labels_of(4)), (second, torch.tensor([0, 1, 1]), labels_of(3))]

    def gradients(model, run):
        model.zero_grad()
        sum(run(model, *call).loss for call in calls).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def stock(model, x, index, labels):
        return model(**{k: v[index] for k, v in x.items()}, labels=labels, use_cache=False)

    def ours(model, x, index, labels):
        return model(**x, labels=labels, use_cache=False, encoder_index=index)

    model.double()
    twin = copy.deepcopy(model)
    assert_within_rounding(gradients(pid.enable(model), ours), lambda: gradients(twin, stock))


def test_umt5_refuses_checkpointing():
    model = pid.enable(checkpointed("umt5", False))
    with pytest.raises(ValueError, match="'umt5'.*gradient checkpointing"):
        model(**inputs(), labels=labels_of(6))


@pytest.mark.parametrize("family", ["t5", "umt5", "bart", "encoder-decoder"])
def test_frozen_encoder(family):
    model = build(family).train()
    for p in model.get_encoder().parameters():
        p.requires_grad_(False)
    assert_like_repeated(model, inputs(), RAGGED)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_frozen_but_one_query_projection(family):
    model = build(family).train().requires_grad_(False)
    name = next(
        n
        for n, p in reversed(list(model.named_parameters()))
        if n.endswith(("EncDecAttention.q.weight", "encoder_attn.q_proj.weight"))
    )
    model.get_parameter(name).requires_grad_(True)
    assert_like_repeated(model, inputs(), UNIFORM)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [name]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("index", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_attention_dropout_is_taken(attention, index):
    """In training, outputs scatter around those without dropout as far as stock's do; in eval mode they do not
    scatter.
    """
    model, x = build("bart", attention, attention_dropout=0.2, decoder_layers=1, encoder_layers=1), inputs()
    module = model.get_decoder().layers[0]
    model.get_encoder().train(False)
    module.self_attn.dropout = 0.0  # cross-attention alone
    attended, labels = [], labels_of(len(index))

    def run(enabled):
        extra = {"encoder_index": index} if enabled else {}
        attended.clear()
        with torch.no_grad():
            model(**(x if enabled else {k: v[index] for k, v in x.items()}), labels=labels, **extra)
        return attended[0]

    handle = module.encoder_attn.out_proj.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    exact, expected = run(False), WithinRounding(lambda: run(False))
    module.train()
    stock = torch.stack([run(False) for _ in range(200)])
    module.eval()
    pid.enable(model)
    expected.check(run(True))
    module.train()
    ours = torch.stack([run(True) for _ in range(200)])
    handle.remove()
    assert not torch.equal(ours[0], ours[1])
    deviation = stock.std(0)
    assert ((ours.mean(0) - exact).abs() / deviation).max() < 6 / 200**0.5  # in standard errors
    assert 0.85 < ours.std(0).mean() / deviation.mean() < 1.15


@pytest.mark.parametrize(
    "prompts", [[[5, 6], [7], []], [[[5, 6]], [[7], [8, 9, 10]], [[], [11]]]], ids=["same", "ragged"]
)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_forward_sums_over_streams(family, prompts):
    """``pid.forward`` against stock on every stream alone, in float64."""
    model, x = build(family).double(), inputs()
    per_input = prompts if isinstance(prompts[0][0], list) else [prompts] * 3
    targets = [[[20 + i, 30 + u, *([40] * u), EOS] for u in range(len(one))] for i, one in enumerate(per_input)]

    def results(loss, logits):
        model.zero_grad(set_to_none=True)
        loss.backward()
        return (
            loss.detach(),
            [row.detach() for row in logits],
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        )

    def alone():
        total, count, logits = 0.0, 0, []
        for i, (ps, ys) in enumerate(zip(per_input, targets)):
            for p, y in zip(ps, ys):
                ids = torch.tensor([[start_of(model), *p, *y[:-1]]])
                row = {k: v[i : i + 1] for k, v in x.items()}
                logits.append(
                    model(**row, decoder_input_ids=ids, decoder_attention_mask=torch.ones_like(ids)).logits[0]
                )
                total = total + F.cross_entropy(logits[-1][len(p) :], torch.tensor(y), reduction="sum")
                count += len(y)
        return results(total / count, logits)

    expected = WithinRounding(alone)
    out = pid.forward(pid.enable(model), prompts=prompts, targets=targets, **x)
    lengths = [len(p) + len(y) for ps, ys in zip(per_input, targets) for p, y in zip(ps, ys)]
    expected.check(results(out.loss, [row[:n] for row, n in zip(out.logits, lengths)]))


def test_targets_without_tokens_count_nothing():
    model = pid.enable(build("t5"))
    one = pid.forward(model, prompts=[[5], [6]], targets=[[[7, EOS], []]], **inputs(1)).loss
    assert_within_rounding(one, lambda: pid.forward(model, prompts=[[5]], targets=[[[7, EOS]]], **inputs(1)).loss)


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_the_index_by_its_older_names(family):
    """The decoder accepts it too, and so does EncoderDecoderModel with its prefix for decoder arguments."""
    model, x, labels = pid.enable(build(family)), inputs(), labels_of(6)
    by_name = model(**x, labels=labels, encoder_index=RAGGED).loss
    name = "decoder_encoder_index" if family == "encoder-decoder" else "encoder_index"
    assert torch.equal(model(**x, labels=labels, **{name: RAGGED}).loss, by_name)
    assert not torch.equal(model(**x, labels=labels).loss, by_name)  # and it is not kept
