"""The fused add and norm equals the unfused model within rounding, and can be undone."""

import copy

import pasta_models as models
import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from torch import nn

from peft_kernels import pasta
from peft_kernels.pasta import fused_layers

FUSIBLE = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "modernbert"]


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of a fused operator got vectors, in order."""
    seen = []
    for name in ("add_layer_norm_inject", "add_inject_layer_norm"):
        operator = getattr(fused_layers, name)

        def spy(*args, operator=operator, **kwargs):
            seen.append("vectors" in kwargs)
            return operator(*args, **kwargs)

        monkeypatch.setattr(fused_layers, name, spy)
    return seen


def _fused_calls(family, model):
    """The expected calls: an add and norm in the middle of each layer and one at its end; the last pre-norm layer has
    none at its end.
    """
    depth = len(models.layers(family, model))
    calls = [False, True] * (depth - 1) + [False, False]
    return calls[:-1] if family == "modernbert" else calls


@pytest.mark.parametrize("task", ["SEQ_CLS", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("family", FUSIBLE)
def test_outputs_and_gradients(family, task, calls):
    model = models.adapted(family, task)
    twin = copy.deepcopy(model)
    pasta.fuse(twin)
    x = models.inputs()
    labels = models.targets(task, x)

    def results(model):
        model.zero_grad()
        out = model(**x, **labels)
        models.loss_of(out).backward()
        return models.main(out).detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    got = results(twin)
    assert calls == _fused_calls(family, model.base_model.model)
    assert_within_rounding(got, lambda: results(model))


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "modernbert"])
def test_training_with_dropout(family):
    """The dropout of the model and of the vectors draw the same as in the unfused model."""
    model = models.adapted(family, dropout=0.3).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    twin = copy.deepcopy(model)
    pasta.fuse(twin)
    x = models.inputs()

    def results(model):
        torch.manual_seed(5)
        loss = model(**x, **models.targets("SEQ_CLS", x)).loss
        return loss.detach(), *torch.autograd.grad(loss, models.vectors(model))

    assert_within_rounding(results(twin), lambda: results(model))


@torch.no_grad()
@pytest.mark.parametrize("family", FUSIBLE)
def test_disabled_and_undone(family, calls):
    stock, model = models.pair(family)
    x = models.inputs()
    expected = model(**x).logits
    kinds = [type(m) for m in model.modules()]
    pasta.fuse(model)
    with model.disable_adapter():
        assert_within_rounding(model(**x).logits, lambda: stock(**x).logits)
    assert calls and not any(calls)
    pasta.unfuse(model)
    calls.clear()
    assert torch.equal(model(**x).logits, expected) and not calls
    assert [type(m) for m in model.modules()] == kinds and not any(hasattr(m, "pasta_fusion") for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", FUSIBLE)
def test_without_an_adapter(family, calls):
    """Adapter and fusion can be added and removed in any order."""
    stock, reference = models.pair(family)
    x = models.inputs()
    base = copy.deepcopy(stock)
    pasta.fuse(base)
    assert_within_rounding(base(**x).logits, lambda: stock(**x).logits)
    model = models.adapted(family, base=base)
    calls.clear()
    assert_within_rounding(model(**x).logits, lambda: reference(**x).logits)
    assert calls == _fused_calls(family, base)
    assert model.unload() is base
    assert_within_rounding(base(**x).logits, lambda: stock(**x).logits)
    pasta.unfuse(base)
    assert_within_rounding(base(**x).logits, lambda: stock(**x).logits)
    assert [type(m) for m in base.modules()] == [type(m) for m in stock.modules()]


@torch.no_grad()
@pytest.mark.parametrize("family", FUSIBLE)
def test_hidden_states(family, calls):
    """Recorded hidden states do not contain vectors."""
    model = models.adapted(family)
    x = models.inputs()
    expected = WithinRounding(lambda: model(**x, output_hidden_states=True))
    pasta.fuse(model)
    expected.check(model(**x, output_hidden_states=True))
    assert calls and not any(calls)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
@pytest.mark.parametrize("why", ["autocast", "checkpointing", "norm"])
def test_stock_path(family, why, calls):
    """The stock path runs if the fused operator would compute something else, or would read freed values when a layer
    runs again.
    """
    model = models.adapted(family)
    if why == "checkpointing":
        model.gradient_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if why == "norm":
        for layer in models.layers(family, model.base_model.model):
            for part in list(layer.modules()):
                for name, norm in list(part.named_children()):
                    if isinstance(norm, nn.LayerNorm):
                        setattr(part, name, nn.Sequential(norm))
    x = models.inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        expected = model(**x).logits
        pasta.fuse(model)
        got = model(**x).logits
    assert torch.equal(got, expected) and not calls
    got.sum().backward()
    assert models.vectors(model).grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_an_input_changed_between_layers(family):
    """A user's hook on a layer takes effect; its input contains the next layer's vectors, so this one changes a token
    without a vector.
    """
    model = models.adapted(family)
    twin = copy.deepcopy(model)
    pasta.fuse(twin)
    x = models.inputs()
    for m in (model, twin):
        models.layers(family, m.base_model.model)[1].register_forward_hook(
            lambda m, args, out: out.index_fill(1, torch.tensor([1]), 0.0)
        )
    assert_within_rounding(twin(**x).logits, lambda: model(**x).logits)


@torch.no_grad()
def test_half_precision():
    """Against float64, within the rounding of the unfused model."""
    model = models.adapted(
        "bert", "FEATURE_EXTRACTION", base=models.stock("bert", "FEATURE_EXTRACTION").to(torch.bfloat16)
    )
    x = models.inputs()
    unfused = WithinRounding(lambda: model(**x).last_hidden_state, copy.deepcopy(model).double()(**x).last_hidden_state)
    pasta.fuse(model)
    fused = model(**x).last_hidden_state
    assert fused.dtype == torch.bfloat16
    unfused.check(fused)


@pytest.mark.parametrize("family", ["albert", "deberta", "deberta-v2"])
def test_other_families_are_refused(family):
    with pytest.raises(ValueError, match=f"fuse: model must be one of .*, got '{family}'"):
        pasta.fuse(models.adapted(family))


def test_misuse():
    model = models.adapted("bert")
    with pytest.raises(ValueError, match="unfuse: model must be fused, got BertModel without fused layers"):
        pasta.unfuse(model)
    pasta.fuse(model)
    with pytest.raises(ValueError, match="fuse: model must not be fused, got BertModel fused already"):
        pasta.fuse(model)
    with pytest.raises(ValueError, match="fuse: chunk_size_feed_forward must be 0, got 4"):
        pasta.fuse(models.stock("bert", chunk_size_feed_forward=4))
