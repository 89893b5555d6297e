"""Training: frozen parameters, checkpointing, compilation, autocast, Trainer."""

import copy

import pasta_models as models
import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from peft import PeftModel, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import Trainer, TrainingArguments

from peft_kernels import PASTAConfig, pasta

CHECKPOINTED = ["bert", "roberta", "electra", "distilbert", "modernbert"]


def _losses(model, batches):
    return [model(**x, **labels).loss for x, labels in batches]


def _batch(seed):
    x = models.inputs(n=9 + seed, seed=seed)
    return x, models.targets("SEQ_CLS", x, seed)


def _gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _train_mode(model, dropout):
    """Train mode, with the model's own dropout everywhere or nowhere."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("family", "fused"),
    [(f, fused) for f in CHECKPOINTED for fused in (False, True)] + [("deberta", False), ("deberta-v2", False)],
)
def test_gradient_checkpointing(family, fused, reentrant):
    """Gradients are equal, also if a second forward, of other rows, precedes the first backward.

    Checkpointing uses the model's own path.
    """
    model = _train_mode(models.adapted(family, dropout=0.3), 0.2)
    batches = [_batch(1), _batch(2)]

    def gradients():
        model.zero_grad()
        torch.manual_seed(5)
        losses = _losses(model, batches)
        for loss in losses:
            loss.backward()
        return torch.stack(losses).detach(), _gradients(model)

    expected = WithinRounding(gradients)
    if fused:
        pasta.fuse(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    expected.check(gradients())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_two_forwards_before_one_backward(family):
    model = _train_mode(models.adapted(family), 0.0)
    batches = [_batch(1), _batch(2)]

    def apart():
        model.zero_grad()
        for batch in batches:
            _losses(model, [batch])[0].backward()
        return _gradients(model)

    expected = WithinRounding(apart)
    model.zero_grad()
    sum(_losses(model, batches)).backward()
    expected.check(_gradients(model))


@pytest.mark.parametrize("impl", ["NO_REENTRANT", "REENTRANT"])
def test_checkpointing_around_a_layer_is_refused(impl):
    """The layer would run again without its vectors: this gives an error, ours or autograd's, not a different
    gradient.
    """
    model = models.adapted("bert")
    layers = model.base_model.model.bert.encoder.layer
    layers[1] = checkpoint_wrapper(layers[1], CheckpointImpl[impl])
    (loss,) = _losses(model, [_batch(1)])
    with pytest.raises(
        RuntimeError, match="a layer runs outside of its encoder's forward|modified by an inplace operation"
    ):
        loss.backward()


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v2"])
def test_the_base_is_frozen(family, tmp_path):
    """No weight of the base ever gets a gradient, however the model was made; with checkpointing too."""
    stock, model = models.pair(family)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path, is_trainable=True)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("default")
    for m in (model, loaded):
        m.gradient_checkpointing_enable()
        _losses(m.train(), [_batch(1)])[0].backward()
        trained = set(_gradients(m))
        assert trained == {n for n, p in m.named_parameters() if p.requires_grad}
        assert all("pasta_vectors.default" in n or "modules_to_save.default" in n for n in trained)
        assert sum("pasta_vectors" in n for n in trained) == 1


COMPILED = [
    ("bert", False),
    ("bert", True),
    ("distilbert", True),
    ("mpnet", False),
    ("modernbert", False),
    ("modernbert", True),
    ("albert", False),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("family", "fused"), COMPILED)
def test_compiled(family, fused, training):
    model = models.adapted(family, dropout=0.3)
    if fused:
        pasta.fuse(model)
    _train_mode(model, 0.0) if training else model.eval()
    x, labels = _batch(1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def results(m):
        torch.manual_seed(3)
        out = m(**x, **labels)
        return out.logits.detach(), *torch.autograd.grad(out.loss, models.vectors(model))

    expected = WithinRounding(lambda: results(model))
    expected.check(results(compiled))
    if not training:
        with torch.no_grad():
            expected.check((compiled(**x).logits,), partial=True)


@pytest.mark.parametrize(
    ("family", "fused"),
    [("bert", False), ("bert", True), ("distilbert", False), ("modernbert", True), ("deberta-v2", False)],
)
def test_autocast(family, fused):
    base, model = models.pair(family)
    if fused:
        pasta.fuse(model)
    x, labels = _batch(1)
    v = models.vectors(model).detach().clone().requires_grad_()

    def results(run, vectors):
        with torch.autocast("cpu", torch.bfloat16):
            out = run()
        return out.logits.detach().float(), *torch.autograd.grad(out.loss, vectors)

    got = results(lambda: model(**x, **labels), models.vectors(model))
    assert got[1].dtype == torch.float32
    assert_within_rounding(got, lambda: results(lambda: models.formula(family, base, v, x, **labels), v))


@pytest.mark.parametrize(("family", "checkpointing"), [("bert", True), ("modernbert", False)])
def test_trainer(family, checkpointing, tmp_path):
    settings = {"num_special_tokens": 3, "special_token_ids": models.SPECIAL, "task_type": "SEQ_CLS", "init": "zero"}
    model = get_peft_model(models.stock(family), PASTAConfig(**settings))
    x = models.inputs(b=8)
    columns = x | models.targets("SEQ_CLS", x)
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=6,
        learning_rate=0.02,
        gradient_checkpointing=checkpointing,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="epoch",
        save_total_limit=1,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert models.vectors(model).abs().sum() > 0
    loaded = PeftModel.from_pretrained(models.stock(family), next(tmp_path.glob("checkpoint-*")))
    assert_within_rounding(loaded(**x).logits, lambda: model.eval()(**x).logits)
