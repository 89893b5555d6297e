"""``enable`` and ``disable`` leave no trace; copies, saved models and adapters are the same as without them."""

import copy

import pytest
import torch
from accuracy import assert_within_rounding
from models import TEXT_FAMILIES, build, decided, inputs
from peft import LoraConfig, TaskType, get_peft_model

from peft_kernels import pid

ALL = [*TEXT_FAMILIES, "whisper"]
BEAMS = {"num_beams": 3, "max_new_tokens": 8, "no_repeat_ngram_size": 2}


def everything(model):
    """All visible state of a model: attributes and hooks of every module, classes, configurations."""
    seen = {}
    for name, module in model.named_modules():
        seen[name] = (
            type(module),
            {
                k: dict(v) if isinstance(v, dict) else v
                for k, v in vars(module).items()
                if k not in ("_modules", "config")
            },
        )
        if hasattr(module, "config"):
            seen[name + ".config"] = module.config.to_dict(), module.config._attn_implementation
    return seen


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", ALL)
def test_disable_undoes_everything(family, attention):
    model = build(family, attention)
    weights, before = copy.deepcopy(model.state_dict()), everything(model)
    modules = dict(model.named_modules())
    assert pid.enable(model) is model and pid.is_enabled(model)
    if family != "whisper":
        model.generate(**inputs(), **BEAMS)
        model(**inputs(), labels=torch.randint(4, 99, (6, 4)))
    assert pid.disable(model) is model and not pid.is_enabled(model)
    assert everything(model).keys() == before.keys()
    for name, seen in everything(model).items():
        assert repr(seen) == repr(before[name]), name
    assert all(dict(model.named_modules())[name] is module for name, module in modules.items())
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_enable_and_disable_as_often_as_you_like(family):
    model, x = build(family), inputs()
    stock = decided(model, lambda: model.generate(**x, **BEAMS))
    assert pid.disable(model) is model
    for _ in range(2):
        pid.enable(model)
        enabled = everything(model)
        pid.enable(model)
        assert repr(everything(model)) == repr(enabled)
        assert torch.equal(model.generate(**x, **BEAMS), stock)
        pid.disable(pid.disable(model))
        assert torch.equal(model.generate(**x, **BEAMS), stock)


@pytest.mark.parametrize("family", ALL)
def test_the_class_keeps_its_name(family):
    model = build(family)
    cls = type(model)
    pid.enable(model)
    assert (type(model).__name__, type(model).__module__, type(model).__qualname__) == (
        cls.__name__,
        cls.__module__,
        cls.__qualname__,
    )
    assert isinstance(model, cls)
    pid.disable(model)
    assert type(model) is cls


@pytest.mark.parametrize("family", ["t5", "umt5", "bart", "encoder-decoder"])
def test_deep_copies_are_independent(family):
    model, x = pid.enable(build(family)), inputs()
    tokens = decided(model, lambda: model.generate(**x, **BEAMS))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    pid.disable(model)
    prompts = [[5, 6], [7]]
    assert pid.is_enabled(twin) and torch.equal(twin.generate(**x, **BEAMS), tokens)
    assert (
        pid.generate(twin, prompts=prompts, **x, max_new_tokens=6).sequences
        == pid.generate(pid.enable(build(family)), prompts=prompts, **x, max_new_tokens=6).sequences
    )
    stock = build(family)
    assert torch.equal(pid.disable(twin).generate(**x, **BEAMS), stock.generate(**x, **BEAMS))


@pytest.mark.parametrize("family", ["t5", "bart", "bigbird_pegasus", "encoder-decoder"])
def test_saved_models_are_stock(family, tmp_path):
    model, x = build(family), inputs()
    stock = decided(model, lambda: model.generate(**x, **BEAMS))
    pid.enable(model).save_pretrained(tmp_path)
    assert "peft_kernels" not in (tmp_path / "config.json").read_text()
    loaded = type(model).__bases__[1].from_pretrained(tmp_path)
    assert loaded.config.architectures == [type(loaded).__name__]
    assert loaded.config._attn_implementation == ("eager" if family == "bigbird_pegasus" else "sdpa")
    assert not pid.is_enabled(loaded)
    assert torch.equal(loaded.generate(**x, **BEAMS), stock)
    assert torch.equal(pid.enable(loaded).generate(**x, **BEAMS), stock)


TARGETS = {
    "t5": ["q", "k", "v", "o"],
    "umt5": ["q", "k", "v", "o"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "encoder-decoder": ["query", "key", "value"],
}


def with_adapter(model, family):
    torch.manual_seed(6)
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, r=4, lora_alpha=8, target_modules=TARGETS[family], lora_dropout=0.0
    )
    model = get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("order", ["enable first", "wrap first", "enable the base"])
@pytest.mark.parametrize("family", TARGETS)
def test_adapters(family, order):
    x, prompts = inputs(), [[5, 6], [7, 8]]
    stock = with_adapter(build(family), family)
    if order == "enable first":
        ours = with_adapter(pid.enable(build(family)), family)
    else:
        ours = with_adapter(build(family), family)
        assert pid.enable(ours if order == "wrap first" else ours.get_base_model()) is not None
    assert pid.is_enabled(ours)
    tokens = decided(stock, lambda: stock.generate(**x, **BEAMS))
    assert not torch.equal(tokens, build(family).generate(**x, **BEAMS))
    assert torch.equal(ours.generate(**x, **BEAMS), tokens)
    generated = pid.generate(ours, prompts=prompts, **x, max_new_tokens=6).sequences
    assert (
        generated
        == pid.generate(
            pid.enable(with_adapter(build(family), family)), prompts=prompts, **x, max_new_tokens=6
        ).sequences
    )

    labels, index = torch.randint(4, 99, (4, 5), generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 1, 2])

    def gradients(model, x, **extra):
        model.zero_grad()
        model(**x, labels=labels, **extra).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    got = gradients(ours.double(), x, encoder_index=index)
    assert got and all("lora_" in name for name in got)
    stock.double()
    assert_within_rounding(got, lambda: gradients(stock, {k: v[index] for k, v in x.items()}))
    pid.disable(ours)
    assert not pid.is_enabled(ours) and torch.equal(ours.float().generate(**x, **BEAMS), tokens)
