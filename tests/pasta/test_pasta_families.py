"""Every family and task against the formula: outputs, and the gradients of vectors and head."""

import copy

import pasta_models as models
import pytest
import torch
import transformers
from peft import get_peft_model

from peft_kernels import PASTAConfig

EVERY = [(family, "SEQ_CLS") for family in models.FAMILIES] + [("deberta-v2", task) for task in ("TOKEN_CLS", "QUESTION_ANS", None)]
EVERY += [(f, t) for f in ("bert", "roberta", "distilbert", "mpnet", "modernbert", "electra") for t in models.TASKS if t != "SEQ_CLS"]
EVERY += [(family, "FEATURE_EXTRACTION") for family in models.GENERIC]


@pytest.mark.parametrize(("family", "task"), EVERY)
def test_outputs_and_gradients(family, task):
    base, model = models.pair(family, task)
    v = models.vectors(model).detach().clone().requires_grad_()
    assert v.shape == (len(models.layers(family, base)), models.P, models.WIDTH)
    x = models.inputs()
    labels = {} if family == "t5" else models.targets(task, x)
    base.requires_grad_(False)
    trained = models.heads(model)
    for name in trained:
        base.get_parameter(name).requires_grad_()
    assert bool(trained) == (task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"))

    expected = models.formula(family, base, v, x, **labels)
    got = model(**x, **labels)
    torch.testing.assert_close(models.main(got), models.main(expected), atol=2e-5, rtol=1e-5)
    models.loss_of(expected).backward()
    models.loss_of(got).backward()
    torch.testing.assert_close(models.vectors(model).grad, v.grad, atol=2e-5, rtol=1e-4)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, base.get_parameter(name).grad, atol=2e-5, rtol=1e-4)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_hidden_states_are_free_of_vectors(family, return_dict):
    """What every layer returns, and the embeddings: as a stock model records them, without what is added to them next."""
    base, model = models.pair(family, "FEATURE_EXTRACTION")
    x = models.inputs()
    additions = [models.dense(x, v) for v in models.vectors(model)]
    expected, layers = [], models.layers(family, base)
    with models.by_formula(family, base, additions):  # and with hooks after its own
        hooks = [layer.register_forward_hook(lambda m, a, out: expected.append(out)) for layer in dict.fromkeys(layers)]
        last = base(**x).last_hidden_state
    for hook in hooks:
        hook.remove()
    got = model(**x, output_hidden_states=True, return_dict=return_dict)
    recorded = got.hidden_states if return_dict else next(t for t in got if isinstance(t, tuple))
    torch.testing.assert_close(recorded[0], base(**x, output_hidden_states=True).hidden_states[0], atol=0, rtol=0)
    assert len(recorded) == len(layers) + 1
    torch.testing.assert_close(recorded[-1], last, atol=2e-5, rtol=1e-5)
    for i, (state, out) in enumerate(zip(recorded[1:-1], expected)):
        if family != "deberta-v2" or i > 0:  # there the convolution comes between
            torch.testing.assert_close(state, out[0] if isinstance(out, tuple) else out, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(recorded[-1], model(**x).last_hidden_state)


@torch.no_grad()
def test_hidden_states_by_configuration():
    base, model = models.pair("bert")
    model = model.base_model.model  # PEFT's own forward hands a None on, which transformers takes for a no
    x = models.inputs()
    for m in (base, model):
        m.config.output_hidden_states = True
    states = model(**x).hidden_states
    assert torch.equal(states[0], base(**x).hidden_states[0]) and not torch.equal(states[1], base(**x).hidden_states[1])
    again = model(**x, output_hidden_states=False)
    assert again.hidden_states is None
    torch.testing.assert_close(again.logits, model(**x).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", models.FAMILIES)
def test_attentions(family):
    base = models.stock(family, "FEATURE_EXTRACTION")
    base.set_attn_implementation("eager")
    model = models.adapted(family, "FEATURE_EXTRACTION", copy.deepcopy(base))
    x = models.inputs()
    expected = models.formula(family, base, models.vectors(model), x, output_attentions=True).attentions
    got = model(**x, output_attentions=True).attentions
    assert len(got) == len(expected) > 0
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_multiple_choice():
    """Rows of the encoder are the choices."""
    torch.manual_seed(0)
    base = transformers.BertForMultipleChoice(transformers.BertConfig(**models.FAMILIES["bert"][1])).eval()
    model = get_peft_model(copy.deepcopy(base), PASTAConfig(num_special_tokens=models.P, special_token_ids=models.SPECIAL)).eval()
    models.fill(model, "default", 1)
    x = models.inputs()
    with models.by_formula("bert", base, [models.dense(x, v) for v in models.vectors(model)]):
        expected = base(**{k: v[None] for k, v in x.items()}).logits
    torch.testing.assert_close(model(**{k: v[None] for k, v in x.items()}).logits, expected)
