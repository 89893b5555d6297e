"""The fused add and norm: the unfused model within rounding, and undone."""

import copy

import pasta_models as models
import pytest
import torch
from torch import nn

from peft_kernels import pasta
from peft_kernels.pasta import fused_layers

FUSIBLE = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "modernbert"]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of a fused operator had vectors to add, in order."""
    seen = []
    for name in ("add_layer_norm_inject", "add_inject_layer_norm"):
        operator = getattr(fused_layers, name)

        def spy(*args, operator=operator, **kwargs):
            seen.append("vectors" in kwargs)
            return operator(*args, **kwargs)

        monkeypatch.setattr(fused_layers, name, spy)
    return seen


def _fused_calls(family, model):
    """One add and norm in the middle of a layer and one at its end, which a last pre-norm layer leaves to others."""
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
    expected, got = model(**x, **labels), twin(**x, **labels)
    assert calls == _fused_calls(family, model.base_model.model)
    torch.testing.assert_close(models.main(got), models.main(expected), **CLOSE)
    models.loss_of(expected).backward()
    models.loss_of(got).backward()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "modernbert"])
def test_training_with_dropout(family):
    """The model's own dropout and the vectors' draw what they draw in the unfused model."""
    model = models.adapted(family, dropout=0.3).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    twin = copy.deepcopy(model)
    pasta.fuse(twin)
    x = models.inputs()
    results = []
    for m in (model, twin):
        torch.manual_seed(5)
        loss = m(**x, **models.targets("SEQ_CLS", x)).loss
        loss.backward()
        results.append((loss.detach(), models.vectors(m).grad))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FUSIBLE)
def test_disabled_and_undone(family, calls):
    stock, model = models.pair(family)
    x = models.inputs()
    expected = model(**x).logits
    kinds = [type(m) for m in model.modules()]
    pasta.fuse(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(**x).logits, stock(**x).logits, **CLOSE)
    assert calls and not any(calls)
    pasta.unfuse(model)
    calls.clear()
    assert torch.equal(model(**x).logits, expected) and not calls
    assert [type(m) for m in model.modules()] == kinds and not any(hasattr(m, "pasta_fusion") for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", FUSIBLE)
def test_without_an_adapter(family, calls):
    """The order in which adapter and fusion come and go does not matter."""
    stock, reference = models.pair(family)
    x = models.inputs()
    base = copy.deepcopy(stock)
    pasta.fuse(base)
    torch.testing.assert_close(base(**x).logits, stock(**x).logits, **CLOSE)
    model = models.adapted(family, base=base)
    calls.clear()
    torch.testing.assert_close(model(**x).logits, reference(**x).logits, **CLOSE)
    assert calls == _fused_calls(family, base)
    assert model.unload() is base
    torch.testing.assert_close(base(**x).logits, stock(**x).logits, **CLOSE)
    pasta.unfuse(base)
    assert torch.equal(base(**x).logits, stock(**x).logits)
    assert [type(m) for m in base.modules()] == [type(m) for m in stock.modules()]


@torch.no_grad()
@pytest.mark.parametrize("family", FUSIBLE)
def test_hidden_states(family, calls):
    """What is recorded is free of vectors."""
    model = models.adapted(family)
    x = models.inputs()
    expected = model(**x, output_hidden_states=True)
    pasta.fuse(model)
    got = model(**x, output_hidden_states=True)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(got.hidden_states, expected.hidden_states, **CLOSE)
    assert calls and not any(calls)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
@pytest.mark.parametrize("why", ["autocast", "checkpointing", "norm"])
def test_stock_path(family, why, calls):
    """Where the fused operator would not do what the model does, or would read what is gone when a layer runs again."""
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
    """A hook of the user's on a layer is heeded; what it sees holds the next layer's vectors, so this one changes a token without."""
    model = models.adapted(family)
    twin = copy.deepcopy(model)
    pasta.fuse(twin)
    x = models.inputs()
    for m in (model, twin):
        models.layers(family, m.base_model.model)[1].register_forward_hook(lambda m, args, out: out.index_fill(1, torch.tensor([1]), 0.0))
    expected, got = model(**x).logits, twin(**x).logits
    torch.testing.assert_close(got, expected, **CLOSE)


@torch.no_grad()
def test_half_precision():
    """Against float64, not worse than the unfused model by more than what a few roundings may do."""
    model = models.adapted("bert", "FEATURE_EXTRACTION", base=models.stock("bert", "FEATURE_EXTRACTION").to(torch.bfloat16))
    x = models.inputs()
    unfused = model(**x).last_hidden_state
    pasta.fuse(model)
    fused = model(**x).last_hidden_state
    assert fused.dtype == torch.bfloat16
    pasta.unfuse(model)
    exact = model.double()(**x).last_hidden_state
    assert (fused - exact).norm() <= 2 * (unfused - exact).norm()


@pytest.mark.parametrize("family", ["albert", "deberta", "deberta-v2"])
def test_other_families_are_refused(family):
    with pytest.raises(ValueError, match=f"fuse: model must be one of .*, got '{family}'"):
        pasta.fuse(models.adapted(family))


def test_misuse():
    model = models.adapted("bert")
    with pytest.raises(ValueError, match="unfuse: model must be fused, got BertModel as it was"):
        pasta.unfuse(model)
    pasta.fuse(model)
    with pytest.raises(ValueError, match="fuse: BertModel is fused already"):
        pasta.fuse(model)
    with pytest.raises(ValueError, match="fuse: chunk_size_feed_forward must be 0, got 4"):
        pasta.fuse(models.stock("bert", chunk_size_feed_forward=4))
