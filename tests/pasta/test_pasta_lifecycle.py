"""Save and load, copies, disable, several adapters, mixed batches, unload."""

import copy
import subprocess
import sys

import pasta_models as models
import pytest
import torch
import transformers
from accuracy import WithinRounding, assert_within_rounding
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_kernels import PASTAConfig, pasta

SOME = ["bert", "roberta", "distilbert", "mpnet", "modernbert", "deberta-v2", "albert-groups"]
FEATURES = "FEATURE_EXTRACTION"
FUSED_OR_NOT = [(family, fused) for family in ("bert", "distilbert", "mpnet", "modernbert") for fused in (False, True)]


def _out(model, x, **kwargs):
    return models.main(model(**x, **kwargs))


@torch.no_grad()
@pytest.mark.parametrize("family", SOME)
def test_save_and_load(family, tmp_path):
    base, model = models.pair(family)
    x = models.inputs()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.pasta.pasta_vectors"], models.vectors(model))
    assert len(saved) == 1 + len(models.heads(model)) and all(
        any(part in key for part in ("pasta", "classifier", "pooler", ".head.")) for key in saved
    )
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(models.vectors(loaded), models.vectors(model))
    assert_within_rounding(_out(loaded, x), lambda: _out(model, x))
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@torch.no_grad()
def test_load_without_allocating_first(tmp_path):
    base, model = models.pair("bert", FEATURES)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base.to(torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(models.vectors(loaded), models.vectors(model)) and models.vectors(loaded).dtype == torch.float32
    assert torch.isfinite(_out(loaded, models.inputs())).all()


def test_saved_configuration_is_complete(tmp_path):
    models.adapted("bert", overflow="last", dropout=0.3).save_pretrained(tmp_path)
    config = PASTAConfig.from_pretrained(tmp_path)
    assert (config.num_special_tokens, config.special_token_ids, config.overflow, config.dropout) == (
        models.P,
        models.SPECIAL,
        "last",
        0.3,
    )


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"cls_token": "[CLS]", "sep_token": "[SEP]", "bos_token": "<s>"}, [5, 6]),
        ({"bos_token": "<s>", "eos_token": "</s>"}, [7, 8]),
        ({"cls_token": "<s>", "sep_token": "<s>"}, [7]),
        ({}, None),
    ],
)
def test_special_tokens_of_a_tokenizer(tokens, expected, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {"[UNK]": 0, "[CLS]": 5, "[SEP]": 6, "<s>": 7, "</s>": 8}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")), **tokens
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    base = models.stock("bert")
    config = PASTAConfig(tokenizer_name_or_path=str(tmp_path / "tokenizer"))
    if expected is None:
        with pytest.raises(ValueError, match="has none of them, nor bos_token or eos_token"):
            get_peft_model(base, config)
        return
    model = get_peft_model(base, config)
    assert config.special_token_ids == expected
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    loaded = PeftModel.from_pretrained(models.stock("bert"), tmp_path / "adapter")
    assert loaded.peft_config["default"].special_token_ids == expected


def test_tokenizer_beside_the_model(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"[UNK]": 0, "[CLS]": 5, "[SEP]": 6}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, cls_token="[CLS]", sep_token="[SEP]").save_pretrained(
        tmp_path
    )
    models.stock("bert").save_pretrained(tmp_path)
    model = get_peft_model(transformers.AutoModel.from_pretrained(tmp_path), PASTAConfig())
    assert model.peft_config["default"].special_token_ids == [5, 6]


@torch.no_grad()
@pytest.mark.parametrize("family", SOME)
def test_disabled_is_stock(family):
    stock, model = models.pair(family)
    x = models.inputs()
    expected = WithinRounding(lambda: _out(stock, x))
    with model.disable_adapter():
        expected.check(_out(model, x))
    assert not torch.equal(_out(model, x), _out(stock, x))
    expected.check(_out(model, x, adapter_names=["__base__"] * 4))


@torch.no_grad()
@pytest.mark.parametrize("family", SOME)
def test_unload_leaves_the_stock_model(family):
    stock, model = models.pair(family)
    base = model.unload()
    assert [type(m) for m in base.modules()] == [type(m) for m in stock.modules()]
    assert base.state_dict().keys() == stock.state_dict().keys()
    for module, other in zip(base.modules(), stock.modules()):
        assert set(vars(module)) - set(vars(other)) <= {"_old_forward", "peft_config"}
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._forward_hooks_always_called
    x = models.inputs()
    assert_within_rounding(_out(base, x), lambda: _out(stock, x))
    again = models.adapted(family, base=base)
    assert not torch.equal(_out(again, x), _out(stock, x))


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(how):
    model = models.adapted("bert")
    with pytest.raises(NotImplementedError, match="no weight of the model depends on their positions"):
        getattr(model, how)()
    assert torch.isfinite(_out(model, models.inputs())).all()


@pytest.mark.parametrize(("family", "fused"), FUSED_OR_NOT)
def test_copies_and_pickles(family, fused, tmp_path):
    model = models.adapted(family)
    if fused:
        pasta.fuse(model)
    torch.save(model, tmp_path / "model.pt")
    x = models.inputs()
    expected = _out(model, x)
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert_within_rounding(_out(twin, x), lambda: _out(model, x))
        _out(twin, x).sum().backward()
        assert models.vectors(twin).grad is not None and models.vectors(model).grad is None
        models.fill(twin, "default", 7)
        assert not torch.equal(_out(twin, x), expected) and torch.equal(_out(model, x), expected)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        twin.unload()
        assert type(models.layers(family, model.base_model.model)[0]) is not type(
            models.layers(family, twin.base_model.model)[0]
        )


def _two(family, **config):
    base = models.stock(family, FEATURES)
    alone = [models.adapted(family, FEATURES, copy.deepcopy(base), seed=seed, **config) for seed in (1, 2)]
    both = models.adapted(family, FEATURES, copy.deepcopy(base), seed=1, **config)
    both.add_adapter("other", copy.deepcopy(alone[1].peft_config["default"]))
    models.fill(both, "other", 2)
    return base, alone, both


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_two_adapters(family, tmp_path):
    _, alone, both = _two(family)
    x = models.inputs()
    for adapter, reference in zip(("default", "other"), alone):
        both.set_adapter(adapter)
        assert_within_rounding(_out(both, x), lambda: _out(reference, x))
        assert models.vectors(both, adapter).requires_grad
    assert not models.vectors(both, "default").requires_grad
    both.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.stock(family, FEATURES), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="second")
    loaded.set_adapter("second")
    assert_within_rounding(_out(loaded, x), lambda: _out(both, x))
    both.delete_adapter("other")
    layer = both.base_model.model.pasta
    assert both.active_adapters == ["default"] and list(layer.configs) == list(layer.special_ids) == ["default"]
    assert_within_rounding(_out(both, x), lambda: _out(alone[0], x))


MIXED = ["default", "other", "__base__", "other"]


@pytest.mark.parametrize("overflow", ["error", "last"])
@pytest.mark.parametrize(("family", "fused"), FUSED_OR_NOT + [("deberta-v2", False), ("albert", False)])
def test_mixed_batch_equals_separate_runs(family, overflow, fused):
    base, alone, both = _two(family, overflow=overflow)
    if fused:
        pasta.fuse(both)
    parts = {"default": alone[0], "other": alone[1]}
    both.base_model.set_requires_grad(["default", "other"], True)
    x = models.inputs()
    x["input_ids"][2, 3:6] = models.SEP  # more than the adapters have vectors, in the row without an adapter
    got = _out(both, x, adapter_names=MIXED)
    gradients = torch.autograd.grad(got.square().sum(), [models.vectors(both, adapter) for adapter in parts])

    def separate():
        rows = [_out(parts.get(name, base), {k: v[i : i + 1] for k, v in x.items()})[0] for i, name in enumerate(MIXED)]
        loss = sum(row.square().sum() for name, row in zip(MIXED, rows) if name != "__base__")
        return torch.stack(rows).detach(), torch.autograd.grad(
            loss, [models.vectors(reference) for reference in parts.values()]
        )

    assert_within_rounding((got, gradients), separate)


def test_another_method_after_unloading():
    from peft import LoraConfig

    model = models.adapted("bert", FEATURES)
    lora = get_peft_model(model.unload(), LoraConfig(task_type=FEATURES))
    assert torch.isfinite(_out(lora, models.inputs())).all()


def test_import_needs_torch_only():
    code = (
        "import sys, peft_kernels; assert not {'transformers', 'peft'} & set(sys.modules);"
        "from peft_kernels import PASTAConfig; import peft; assert 'PASTA' in peft.PeftType.__members__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
