"""Every family and task against the formula: outputs, and the gradients of vectors and head."""

import copy

import pasta_models as models
import pytest
import torch
import transformers
from accuracy import WithinRounding, assert_within_rounding
from peft import get_peft_model

from peft_kernels import PASTAConfig

EVERY = [(family, "SEQ_CLS") for family in models.FAMILIES] + [
    ("deberta-v2", task) for task in ("TOKEN_CLS", "QUESTION_ANS", None)
]
EVERY += [
    (f, t)
    for f in ("bert", "roberta", "distilbert", "mpnet", "modernbert", "electra")
    for t in models.TASKS
    if t != "SEQ_CLS"
]
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

    def results(run, parameters):
        out = run()
        return models.main(out).detach(), torch.autograd.grad(models.loss_of(out), parameters)

    expected = WithinRounding(
        lambda: results(lambda: models.formula(family, base, v, x, **labels), [v, *map(base.get_parameter, trained)])
    )
    expected.check(results(lambda: model(**x, **labels), [models.vectors(model), *trained.values()]))
    models.loss_of(model(**x, **labels)).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_hidden_states_are_free_of_vectors(family, return_dict):
    """The embeddings and the layers' outputs are recorded as in a stock model, without the vectors that are added to
    them next.
    """
    base, model = models.pair(family, "FEATURE_EXTRACTION")
    x = models.inputs()
    additions = [models.dense(x, v) for v in models.vectors(model)]
    layers = models.layers(family, base)

    def stock():
        states = []
        with models.by_formula(family, base, additions):  # hooks that run after its own
            hooks = [
                layer.register_forward_hook(lambda m, a, out: states.append(out)) for layer in dict.fromkeys(layers)
            ]
            last = base(**x).last_hidden_state
        for hook in hooks:
            hook.remove()
        between = [out[0] if isinstance(out, tuple) else out for out in states[:-1]]
        return dict(enumerate([base(**x, output_hidden_states=True).hidden_states[0], *between, last]))

    got = model(**x, output_hidden_states=True, return_dict=return_dict)
    recorded = got.hidden_states if return_dict else next(t for t in got if isinstance(t, tuple))
    assert len(recorded) == len(layers) + 1
    # in deberta-v2 a convolution follows the first layer
    WithinRounding(stock).check(
        {i: state for i, state in enumerate(recorded) if family != "deberta-v2" or i != 1}, partial=True
    )
    assert_within_rounding(recorded[-1], lambda: model(**x).last_hidden_state)


@torch.no_grad()
def test_hidden_states_by_configuration():
    base, model = models.pair("bert")
    model = model.base_model.model  # PEFT's own forward passes on a None, which transformers takes as False
    x = models.inputs()
    for m in (base, model):
        m.config.output_hidden_states = True
    states = model(**x).hidden_states
    assert_within_rounding(states[0], lambda: base(**x).hidden_states[0])
    assert not torch.equal(states[1], base(**x).hidden_states[1])
    again = model(**x, output_hidden_states=False)
    assert again.hidden_states is None
    assert_within_rounding(again.logits, lambda: model(**x).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", models.FAMILIES)
def test_attentions(family):
    base = models.stock(family, "FEATURE_EXTRACTION")
    base.set_attn_implementation("eager")
    model = models.adapted(family, "FEATURE_EXTRACTION", copy.deepcopy(base))
    x = models.inputs()
    got = model(**x, output_attentions=True).attentions
    assert got
    assert_within_rounding(
        got, lambda: models.formula(family, base, models.vectors(model), x, output_attentions=True).attentions
    )


def test_multiple_choice():
    """The encoder's rows are the choices."""
    torch.manual_seed(0)
    base = transformers.BertForMultipleChoice(transformers.BertConfig(**models.FAMILIES["bert"][1])).eval()
    model = get_peft_model(
        copy.deepcopy(base), PASTAConfig(num_special_tokens=models.P, special_token_ids=models.SPECIAL)
    ).eval()
    models.fill(model, "default", 1)
    x = models.inputs()
    choices = {k: v[None] for k, v in x.items()}

    def expected():
        with models.by_formula("bert", base, [models.dense(x, v) for v in models.vectors(model)]):
            return base(**choices).logits

    assert_within_rounding(model(**choices).logits, expected)
