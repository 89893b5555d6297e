"""PASTA in combination with other PEFT methods, offloaded and sharded weights, and the integration in transformers."""

import copy

import pasta_models as models
import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from accuracy import WithinRounding, assert_within_rounding
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from peft_kernels import DePTConfig, PASTAConfig, pasta

METHODS = {
    "lora": lambda: LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, target_modules=["query", "value"]),
    "ia3": lambda: IA3Config(
        task_type="SEQ_CLS", init_ia3_weights=False, target_modules=["key", "value"], feedforward_modules=[]
    ),
    "prefix": lambda: PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
    "prompt": lambda: PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
    "dept": lambda: DePTConfig(task_type="SEQ_CLS", num_virtual_tokens=2, r=2, max_length=16),
}


def _pasta(model, adapter_name="default"):
    config = PASTAConfig(
        num_special_tokens=models.P, special_token_ids=models.SPECIAL, task_type="SEQ_CLS", dropout=0.0
    )
    return get_peft_model(model, config, adapter_name=adapter_name).eval()


def _inner(model):
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


@torch.no_grad()
def _fill_vectors(model, adapter):
    v = _inner(model).pasta.pasta_vectors[adapter]
    return v.copy_(torch.randn(v.shape, generator=torch.Generator().manual_seed(1)))


def _with_head(model, head):
    _inner(model).classifier = copy.deepcopy(head)
    return model


# PEFT has no prefix tuning of a PeftModel
COMPOSED = [
    ("lora", "default", order, fused) for order in ("below", "above") for fused in (None, "before", "between", "after")
]
COMPOSED += [
    ("ia3", "default", "below", None),
    ("ia3", "default", "above", None),
    ("lora", "other", "below", "after"),
    ("prefix", "other", "below", None),
]


@torch.no_grad()
@pytest.mark.parametrize(("method", "name", "order", "fused"), COMPOSED)
def test_with_another_method(method, name, order, fused):
    """The vectors are added in the model that the other method makes; removing either leaves the other."""
    stock, x = models.stock("bert"), models.inputs()
    torch.manual_seed(3)
    alone = get_peft_model(copy.deepcopy(stock), METHODS[method](), adapter_name=name).eval()
    if method == "prefix":
        try:
            alone(**x)
        except ValueError as error:  # PEFT 0.21 passes an argument that transformers 5.24 has removed from encoders
            pytest.skip(str(error))
    model = copy.deepcopy(stock)
    if fused == "before":
        pasta.fuse(model)
    if order == "above":
        model = _pasta(model)
    torch.manual_seed(3)
    model = get_peft_model(model, METHODS[method](), adapter_name=name).eval()
    if fused == "between":
        pasta.fuse(model)
    if order == "below":
        model = _pasta(model)
    if fused == "after":
        pasta.fuse(model)
    v = _fill_vectors(model, "default")
    head = _inner(model).classifier.modules_to_save["default"]

    def formula():
        with models.by_formula("bert", _inner(alone), [models.dense(x, layer) for layer in v]):
            return _with_head(alone, head)(**x).logits

    expected = WithinRounding(formula)
    for twin in (model, copy.deepcopy(model)):
        expected.check(twin(**x).logits)
    with model.disable_adapter():
        # PEFT disables a method by disabling its modules; a prefix has none
        kept = alone if method == "prefix" else stock
        assert_within_rounding(model(**x).logits, lambda: _with_head(kept, stock.classifier)(**x).logits)
    expected.check(model(**x).logits)
    if order == "below":
        lower = model.unload()
        assert set(lower.peft_config) == {name} and lower.peft_config[name].peft_type == alone.peft_type
        assert_within_rounding(lower(**x).logits, lambda: _with_head(alone, _inner(lower).classifier)(**x).logits)
    else:
        model.merge_adapter()
        expected.check(model(**x).logits)


@pytest.mark.parametrize(
    ("method", "order", "message"),
    [
        ("dept", "below", "PASTA: model has a DePT adapter"),
        ("dept", "above", "DePT: model has a PASTA adapter"),
        ("prompt", "below", "special tokens are found in input_ids, got inputs_embeds alone"),
        ("prompt", "above", "special tokens are found in input_ids, got inputs_embeds alone"),
    ],
)
def test_methods_that_replace_the_input_are_refused(method, order, message):
    with pytest.raises(ValueError, match=message):
        model = models.stock("bert")
        for add in (METHODS[method], None) if order == "below" else (None, METHODS[method]):
            model = _pasta(model, "pasta") if add is None else get_peft_model(model, add())
        model(**models.inputs())


def test_the_name_of_prefix_tuning_below_is_refused():
    model = get_peft_model(models.stock("bert"), METHODS["prefix"]())
    with pytest.raises(
        ValueError, match="PASTA: adapter_name must differ from that of PREFIX_TUNING below, got 'default'"
    ):
        _pasta(model)


def test_another_method_stays_trainable():
    lora = get_peft_model(models.stock("bert"), METHODS["lora"]())
    trainable = {n for n, p in _inner(lora).named_parameters() if p.requires_grad}
    model = _pasta(lora)
    assert {n for n, p in _inner(model).named_parameters() if p.requires_grad} == trainable | {
        "pasta.pasta_vectors.default"
    }


def _offloaded(model, how, folder):
    if how == "cpu":
        return cpu_offload(model, execution_device="cpu")
    if how == "disk":
        return disk_offload(model, folder, execution_device="cpu")
    parts = {name: "cpu" for name, _ in _inner(model).named_children()} | {
        "bert.encoder": "cpu",
        "bert.pooler": "cpu",
        "bert.embeddings": "disk",
    }
    del parts["bert"]
    return dispatch_model(model, parts, main_device="cpu", offload_dir=folder, force_hooks=True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "fused", "how", "order"),
    [
        ("bert", False, "cpu", "before"),
        ("bert", False, "disk", "after"),
        ("bert", False, "device_map", "before"),
        ("bert", True, "cpu", "before"),
        ("modernbert", True, "cpu", "after"),
        ("modernbert", True, "disk", "fused first"),
        ("distilbert", True, "cpu", "after"),
    ],
)
def test_offload(family, fused, how, order, tmp_path):
    """Weights are on meta between the calls of their modules; offload comes before or after the adapter."""
    base, reference = models.pair(family)
    x = models.inputs()
    model = copy.deepcopy(base)
    if fused and order == "fused first":
        pasta.fuse(model)
    if order == "after":
        model = models.adapted(family, base=model)
    if fused and order == "after":
        pasta.fuse(model)
    _offloaded(model, how, tmp_path)
    assert (
        base.get_input_embeddings().weight.device.type == "cpu"
        and _inner(model).get_input_embeddings().weight.device.type == "meta"
    )
    if order != "after":
        model = models.adapted(family, base=model)
    if fused and order == "before":
        pasta.fuse(model)
    expected = WithinRounding(lambda: reference(**x).logits)
    expected.check(model(**x).logits)
    with model.disable_adapter():
        assert_within_rounding(model(**x).logits, lambda: base(**x).logits)
    if fused:
        pasta.unfuse(model)
        expected.check(model(**x).logits)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("family", "fused"), [("bert", False), ("bert", True), ("modernbert", True)])
def test_fsdp2(family, fused, one_rank):
    """Layers and embeddings are their own shards, as accelerate's policy makes them; shards have FSDP classes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = models.adapted(family)
    reference = copy.deepcopy(model)
    if fused:
        pasta.fuse(model)
    mesh = init_device_mesh("cpu", (1,))
    inner = model.base_model.model
    for part in [
        *models.layers(family, inner),
        next(m for n, m in inner.named_modules() if n.endswith("embeddings")),
        model,
    ]:
        fully_shard(part, mesh=mesh)
    x = models.inputs()

    def results():
        logits = reference(**x).logits
        return logits.detach(), *torch.autograd.grad(logits.sum(), models.vectors(reference))

    out = model(**x).logits
    out.sum().backward()
    assert_within_rounding((out.detach(), models.vectors(model).grad.full_tensor()), results)
    if fused:
        pasta.unfuse(model)
    model.unload()
    assert not any("pasta" in name for m in inner.modules() for name in vars(m)) and all(
        type(layer).__name__.startswith("FSDP") for layer in models.layers(family, inner)
    )


@torch.no_grad()
def test_the_integration_in_transformers(tmp_path):
    base, x = models.stock("bert"), models.inputs()
    model = copy.deepcopy(base)
    try:
        model.add_adapter(PASTAConfig(num_special_tokens=3, special_token_ids=models.SPECIAL))
    except ValueError as error:
        pytest.skip(str(error))  # a transformers that requires a newer PEFT
    model.pasta.pasta_vectors["default"].normal_()
    model.eval()
    stock, adapted = (WithinRounding(lambda m=m: m(**x).logits) for m in (base, model))
    with pytest.raises(AssertionError, match="error"):
        stock.check(model(**x).logits)
    model.disable_adapters()
    stock.check(model(**x).logits)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(base)
    loaded.load_adapter(tmp_path)
    adapted.check(loaded.eval()(**x).logits)
    model.delete_adapter("default")
    stock.check(model(**x).logits)


@pytest.mark.parametrize("fused", [False, True])
def test_dynamic_int8(fused):
    """The base's linear layers are quantised; the vectors go into the same layers."""
    quantised = torch.ao.quantization.quantize_dynamic(models.stock("bert"), {nn.Linear}, dtype=torch.qint8)
    model = models.adapted("bert", base=copy.deepcopy(quantised))
    if fused:
        pasta.fuse(model)
    x = models.inputs()
    with torch.no_grad():
        assert_within_rounding(
            model(**x).logits, lambda: models.formula("bert", quantised, models.vectors(model), x).logits
        )


@pytest.mark.parametrize("flag", ["bf16", "fp16"])
def test_trainer_in_half_precision(flag, tmp_path):
    model = models.adapted("bert", init="zero")
    pasta.fuse(model)
    x = models.inputs(b=8) | models.targets("SEQ_CLS", models.inputs(b=8))
    rows = [{k: v[i] for k, v in x.items()} for i in range(8)]
    settings = {
        "report_to": [],
        "max_steps": 8,
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 0.02,
        flag: True,
    }
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(str(tmp_path), **settings), train_dataset=rows, eval_dataset=rows
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_integers_are_refused():
    config = transformers.IBertConfig(**models.FAMILIES["bert"][1], quant_mode=True)
    with pytest.raises(ValueError, match="the layers of IBertModel with quant_mode=True compute with integers"):
        get_peft_model(transformers.IBertModel(config), PASTAConfig(special_token_ids=models.SPECIAL))
