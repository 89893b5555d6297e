"""Tokens that get a vector, dropout, and in-place changes."""

import copy

import pasta_models as models
import pytest
import torch
import transformers
from accuracy import WithinRounding, assert_within_rounding
from peft import get_peft_model

from peft_kernels import PASTAConfig
from peft_kernels.ops.vector_dropout import factors


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v2"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(family, padding):
    """Special tokens are counted among the tokens that are not padding, even if [PAD] is one of them."""
    base = models.stock(family)
    model = models.adapted(family, base=copy.deepcopy(base), special_token_ids=[*models.SPECIAL, models.PAD])
    x = models.inputs(padding=padding)
    assert_within_rounding(model(**x).logits, lambda: models.formula(family, base, models.vectors(model), x).logits)


@torch.no_grad()
def test_without_a_mask():
    base, model = models.pair("bert")
    x = models.inputs(padding="left")
    shown = {**x, "attention_mask": torch.ones_like(x["input_ids"])}
    expected = WithinRounding(lambda: models.formula("bert", base, models.vectors(model), shown).logits)
    expected.check(model(input_ids=x["input_ids"]).logits)
    expected.check(model(x["input_ids"]).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_packed_rows(family):
    """A row holds several texts, each of which attends to itself only; special tokens are counted through the row."""
    base, model = models.pair(family, "FEATURE_EXTRACTION", num_special_tokens=4)
    ids = torch.randint(4, models.VOCAB, (2, 10))
    ids[:, [0, 5]], ids[:, [4, 9]] = models.CLS, models.SEP
    text = torch.arange(10) // 5
    position_ids = (torch.arange(10) % 5).expand(2, -1)
    sees = (text[:, None] == text)[None, None].expand(2, 1, -1, -1)
    mask = sees if family == "bert" else {"full_attention": sees, "sliding_attention": sees}
    v, everywhere = models.vectors(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def expected():
        with models.by_formula(family, base, [models.dense(everywhere, layer) for layer in v]):
            return base(input_ids=ids, attention_mask=mask, position_ids=position_ids).last_hidden_state

    got = model(input_ids=ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
    assert_within_rounding(got, expected)
    alone = {"input_ids": ids[:, :5], "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    assert_within_rounding(got[:, :5], lambda: models.formula(family, base, v[:, :2], alone).last_hidden_state)


@torch.no_grad()
def test_rows_differ_in_their_number_of_special_tokens():
    base, model = models.pair("bert", num_special_tokens=5)
    x = models.inputs()
    x["input_ids"][0] = models.CLS  # eleven, with a mask for the first four
    x["attention_mask"][0, 4:] = 0
    x["input_ids"][1, [0, 4]], x["input_ids"][1, -3] = 7, 8  # none
    assert [len(row) for row in models.slots(x)] == [4, 0, 2, 3]
    assert_within_rounding(model(**x).logits, lambda: models.formula("bert", base, models.vectors(model), x).logits)


def _logits_and_gradient(run, vectors):
    logits = run().logits
    return logits.detach(), *torch.autograd.grad(logits.square().sum(), vectors)


def test_overflow():
    base, model = models.pair("bert", num_special_tokens=2)
    x = models.inputs()
    message = (
        r"max_slots=2, but row 1 has 3 special tokens. The adapter has num_special_tokens=2 vectors for tokens"
        r" \[0, 2\]; overflow='last'"
    )
    with pytest.raises(ValueError, match=message):
        model(**x)
    rows = {k: v[::2] for k, v in x.items()}
    assert torch.isfinite(model(**rows).logits).all()  # and the failed forward leaves nothing behind
    last = models.adapted("bert", base=copy.deepcopy(base), num_special_tokens=2, overflow="last")
    v = models.vectors(last).detach().clone().requires_grad_()
    expected = WithinRounding(lambda: _logits_and_gradient(lambda: models.formula("bert", base, v, x), v))
    expected.check(_logits_and_gradient(lambda: last(**x), models.vectors(last)))


def test_a_failed_forward_leaves_nothing():
    _, model = models.pair("bert")
    layer = models.layers("bert", model.base_model.model)[1]
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**models.inputs())
    handle.remove()
    assert layer.pasta_state.call.get() is None


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert", "deberta-v2"])
def test_dropout(family):
    """Each row, special token and layer has its own draw; evaluation draws nothing."""
    base, model = models.pair(family, dropout=0.4)
    x, p = models.inputs(), 0.4
    v = models.vectors(model).detach().clone().requires_grad_()
    assert_within_rounding(model(**x).logits, lambda: models.formula(family, base, v, x).logits)
    model.base_model.model.base_model.train()  # some heads drop as well
    generator = torch.get_rng_state()
    got = _logits_and_gradient(lambda: model(**x), models.vectors(model))
    torch.set_rng_state(generator)
    seeds = torch.randint(2**63 - 1, (len(v),))
    shape = x["input_ids"].shape[0], models.P, models.WIDTH

    def expected():
        additions = [models.dense(x, layer * factors(p, seed.reshape(1), *shape)) for layer, seed in zip(v, seeds)]
        with models.by_formula(family, base, additions):
            return base(**x)

    assert_within_rounding(got, lambda: _logits_and_gradient(expected, v))
    assert not torch.equal(model(**x).logits, got[0])


def _returned(family, model, run):
    """The output of each layer, in its state after ``run()``."""
    returned = []
    handles = [
        layer.register_forward_hook(lambda m, args, out: returned.append(out[0] if isinstance(out, tuple) else out))
        for layer in models.layers(family, model)
    ]
    run()
    for handle in handles:
        handle.remove()
    return returned


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "in_place"), [("bert", True), ("mpnet", True), ("modernbert", True), ("deberta-v2", False)]
)
def test_in_place(family, in_place):
    """If only the layer uses a hidden state, the vectors are added in place to the previous layer's output; otherwise
    to a copy.
    """
    base, model = models.pair(family, "FEATURE_EXTRACTION")
    x = models.inputs()
    additions = [models.dense(x, v) for v in models.vectors(model)]

    def stock():
        with models.by_formula(family, base, additions):
            return _returned(family, base, lambda: base(**x))

    def changed():
        states = stock()
        return [state + addition for state, addition in zip(states, additions[1:])] + states[-1:]

    assert_within_rounding(
        _returned(family, model.base_model.model, lambda: model(**x)), changed if in_place else stock
    )
    assert_within_rounding(
        _returned(family, model.base_model.model, lambda: model(**x, output_hidden_states=True)), stock
    )


@pytest.mark.parametrize("how", ["leaf", "view"])
def test_inputs_of_others_are_copied(how):
    """A hook gives the first layer a leaf that requires a gradient, or a view."""
    _, model = models.pair("bert")
    x, outer = models.inputs(), torch.randn(4, 12, models.WIDTH, requires_grad=how == "leaf")
    given = outer[:, 1:] if how == "view" else outer.detach()[:, 1:].clone().requires_grad_()
    kept = given.detach().clone()
    model.base_model.model.bert.embeddings.register_forward_hook(lambda *_: given)
    model(**x).logits.sum().backward()
    assert torch.equal(given, kept) and (how == "view" or given.grad.abs().sum() > 0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    """Vectors are kept in float32 or wider; one addition rounds as the formula's does."""
    base = models.stock("bert").to(dtype)
    model = models.adapted("bert", base=copy.deepcopy(base))
    v = models.vectors(model)
    assert v.dtype == torch.promote_types(dtype, torch.float32)
    v.copy_(v.to(dtype))
    x = models.inputs()
    assert_within_rounding(model(**x).logits, lambda: models.formula("bert", base, v.to(dtype), x).logits)


def test_initialisation():
    base = models.stock("bert", num_hidden_layers=8)
    config = {"num_special_tokens": 4, "special_token_ids": [2, 0, 2], "task_type": "SEQ_CLS"}
    model = get_peft_model(copy.deepcopy(base), PASTAConfig(**config)).eval()
    v = models.vectors(model)
    assert v.shape == (8, 4, models.WIDTH) and v.dtype == torch.float32
    assert abs(v.std() - 0.02) < 0.002 and abs(v.mean()) < 0.002
    assert model.peft_config["default"].special_token_ids == [2, 0]
    zero = get_peft_model(copy.deepcopy(base), PASTAConfig(**config, init="zero")).eval()
    x = models.inputs()
    assert not models.vectors(zero).any()
    assert_within_rounding(zero(**x).logits, lambda: base(**x).logits)


def test_only_what_it_says_is_trained():
    model = get_peft_model(
        transformers.BertModel(transformers.BertConfig(**models.FAMILIES["bert"][1])),
        PASTAConfig(special_token_ids=[0, 2]),
    )
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 3 * 2 * models.WIDTH and total > trainable
