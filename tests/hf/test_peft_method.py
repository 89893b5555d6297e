"""Common behaviour of DePT and PASTA: task heads, removal of adapters, errors."""

import copy

import pytest
import torch
import transformers
from accuracy import WithinRounding, assert_within_rounding
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper

from peft_kernels import DePTConfig, PASTAConfig

_SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 1,
}
_BERT = {**_SMALL, "initializer_range": 0.3}
_DISTILBERT = {
    "vocab_size": 99,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "initializer_range": 0.3,
    "pad_token_id": 1,
}
_MODERNBERT = {**_BERT, "cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
_BART = {
    **{
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    },
    "vocab_size": 99,
    "d_model": 32,
    "pad_token_id": 1,
    "init_std": 0.3,
}
_T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_T5["decoder_start_token_id"] = 1
MODELS = {
    "bert": ("Bert", _BERT),
    "roberta": ("Roberta", _BERT),
    "distilbert": ("DistilBert", _DISTILBERT),
    "modernbert": ("ModernBert", _MODERNBERT),
    "bart": ("Bart", _BART),
    "t5": ("T5", _T5),
}
TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
CONFIGS = {
    "dept": lambda **kw: DePTConfig(num_virtual_tokens=2, r=2, max_length=16, **kw),
    "pasta": lambda **kw: PASTAConfig(special_token_ids=[0, 2], dropout=0.0, **kw),
}


def _class(family, kind):
    return getattr(transformers, MODELS[family][0] + kind)


def _base(family, task):
    torch.manual_seed(0)
    config = getattr(transformers, f"{MODELS[family][0]}Config")(**MODELS[family][1])
    return _class(family, TASKS[task])(config).eval()


def _inputs(b=4, n=9):
    ids = torch.randint(4, 99, (b, n), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = 0, 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _out(model, x, **kwargs):
    out = model(**x, **kwargs)
    return out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], -1)


@torch.no_grad()
def _fill(model, adapter, seed):
    """Randomise every trained parameter of one adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in f"{name}.":
            parameter.normal_(std=0.3, generator=generator)


def _rows_alone(model, x, names, base=None):
    """The expected mixed batch: each row from a batch that uses the row's adapter for all rows; fills the adapters."""
    for seed, name in enumerate(("default", "b")):
        _fill(model, name, seed)

    def rows():
        alone = {} if base is None else {"__base__": _out(base, x)}
        for name in ("default", "b"):
            model.set_adapter(name)
            alone[name] = _out(model, x)
        return torch.stack([alone[name][i] for i, name in enumerate(names)])

    return WithinRounding(rows)


@torch.no_grad()
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "SEQ_CLS"), ("roberta", "SEQ_CLS"), ("roberta", "TOKEN_CLS"), ("modernbert", "QUESTION_ANS")],
)
def test_a_head_for_each_row(family, task, method):
    base = _base(family, task)
    model = get_peft_model(copy.deepcopy(base), CONFIGS[method](task_type=task)).eval()
    model.add_adapter("b", CONFIGS[method](task_type=task))
    x, names = _inputs(), ["b", "default", "__base__", "b"]
    expected = _rows_alone(model, x, names, base)
    for active in ("default", "b"):
        model.set_adapter(active)
        expected.check(_out(model, x, adapter_names=names))
    with model.disable_adapter():
        assert_within_rounding(_out(model, x, adapter_names=names), lambda: _out(base, x))


@torch.no_grad()
@pytest.mark.parametrize("saved", ["word_embeddings", "embeddings", "pooler"])
def test_other_modules_for_each_row(saved):
    """These modules take arguments by name, or do not take rows."""
    base = _base("bert", "SEQ_CLS")
    model = get_peft_model(base, CONFIGS["pasta"](task_type="SEQ_CLS", modules_to_save=[saved])).eval()
    model.add_adapter("b", CONFIGS["pasta"](task_type="SEQ_CLS", modules_to_save=[saved]))
    x, names = _inputs(), ["b", "default", "default", "b"]
    expected = _rows_alone(model, x, names)
    expected.check(_out(model, x, adapter_names=names))


@torch.no_grad()
@pytest.mark.parametrize("method", CONFIGS)
def test_heads_below_lora_of_another_name(method, tmp_path):
    """PEFT leaves a head without an adapter if the head does not know the name of the adapter above."""
    x, targets = _inputs(), {"target_modules": ["query", "value"]}
    below = get_peft_model(_base("bert", "SEQ_CLS"), CONFIGS[method](task_type="SEQ_CLS")).eval()
    _fill(below, "default", 0)
    expected = WithinRounding(lambda: _out(below, x))
    headless = get_peft_model(copy.deepcopy(below), LoraConfig(**targets), adapter_name="top").eval()
    expected.check(_out(headless, x))  # a new LoRA changes nothing
    model = get_peft_model(below, LoraConfig(task_type="SEQ_CLS", **targets), adapter_name="top").eval()
    (head,) = (m for m in model.modules() if isinstance(m, ModulesToSaveWrapper))
    assert {name for name, p in head.named_parameters() if p.requires_grad} >= {
        f"modules_to_save.top.{n}" for n in ("weight", "bias")
    }
    _fill(model, "top", 1)
    got = _out(model, x)
    head.modules_to_save["default"].weight.zero_()
    assert torch.equal(_out(model, x), got)
    head.modules_to_save["top"].weight.zero_()
    assert not torch.equal(_out(model, x), got)
    with model.disable_adapter():
        assert_within_rounding(_out(model, x), lambda: _out(_base("bert", "SEQ_CLS"), x))


def test_a_saved_module_in_a_checkpointed_layer():
    """The backward pass would run it again with the active adapter's weights for all rows."""
    model = get_peft_model(
        _base("bert", "SEQ_CLS"), CONFIGS["pasta"](task_type="SEQ_CLS", modules_to_save=["intermediate"])
    ).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="bert.encoder.layer.0 is checkpointed and holds one of modules_to_save"):
        model(**_inputs(), adapter_names=["default"] * 4)
    model(**_inputs()).logits.sum().backward()


HEADS = [
    ("dept", "bert", "SEQ_CLS", {"classifier"}),
    ("dept", "modernbert", "QUESTION_ANS", {"classifier"}),
    ("dept", "bart", "SEQ_CLS", {"classification_head"}),
    ("dept", "bart", "QUESTION_ANS", {"qa_outputs"}),
    ("dept", "t5", "SEQ_CLS", {"classification_head"}),
    ("dept", "t5", "QUESTION_ANS", {"qa_outputs"}),
    ("dept", "t5", "TOKEN_CLS", {"classifier"}),
    ("pasta", "modernbert", "QUESTION_ANS", {"classifier"}),
    ("pasta", "modernbert", "SEQ_CLS", {"classifier"}),
    ("pasta", "distilbert", "SEQ_CLS", {"classifier", "pre_classifier"}),
    ("pasta", "roberta", "SEQ_CLS", {"classifier"}),
]


def _wrapped(model):
    return {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}


@torch.no_grad()
@pytest.mark.parametrize(("method", "family", "task", "heads"), HEADS)
def test_every_head_is_trained_and_saved(method, family, task, heads, tmp_path):
    """Two fresh models from one checkpoint of the base have different heads; the adapter brings the head that it was
    trained with.
    """
    kind = "ForMaskedLM" if family == "modernbert" else "Model"  # the former fills part of the head
    torch.manual_seed(0)
    _class(family, kind)(getattr(transformers, f"{MODELS[family][0]}Config")(**MODELS[family][1])).save_pretrained(
        tmp_path / "base"
    )
    cls = _class(family, TASKS[task])
    model = get_peft_model(cls.from_pretrained(tmp_path / "base"), CONFIGS[method](task_type=task)).eval()
    assert _wrapped(model) == heads
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n]
    assert {head for head in heads for n in trained if f".{head}." in n} == heads
    _fill(model, "default", 2)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(7)
    loaded = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    x = _inputs()
    assert_within_rounding(_out(loaded, x), lambda: _out(model, x))


@torch.no_grad()
def test_a_pooler_that_the_checkpoint_has_not(tmp_path):
    base = transformers.BertForMaskedLM(transformers.BertConfig(**_BERT))
    base.save_pretrained(tmp_path / "base")
    cls = transformers.BertForSequenceClassification
    model = get_peft_model(cls.from_pretrained(tmp_path / "base"), CONFIGS["pasta"](task_type="SEQ_CLS")).eval()
    assert _wrapped(model) == {"classifier", "pooler"}
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert_within_rounding(_out(loaded, _inputs()), lambda: _out(model, _inputs()))


def test_heads_that_a_checkpoint_has(tmp_path):
    """They are trained as PEFT trains ``classifier``."""
    _base("bart", "SEQ_CLS").save_pretrained(tmp_path)
    model = get_peft_model(
        _class("bart", TASKS["SEQ_CLS"]).from_pretrained(tmp_path), CONFIGS["dept"](task_type="SEQ_CLS")
    )
    assert _wrapped(model) == {"classification_head"}


@torch.no_grad()
@pytest.mark.parametrize("method", CONFIGS)
def test_after_the_last_adapter(method):
    base, x = _base("bert", "SEQ_CLS"), _inputs()
    model = get_peft_model(copy.deepcopy(base), CONFIGS[method](task_type="SEQ_CLS")).eval()
    _fill(model, "default", 0)
    model.delete_adapter("default")
    stock = WithinRounding(lambda: _out(base, x))
    for twin in (model, copy.deepcopy(model)):
        stock.check(_out(twin, x))
        stock.check(_out(twin, x, adapter_names=["__base__"] * 4))
    with pytest.raises(KeyError):
        get_peft_model(copy.deepcopy(base), CONFIGS[method]()).peft_config["other"]
    model.add_adapter("other", CONFIGS[method](task_type="SEQ_CLS"))
    model.set_adapter("other")
    _fill(model, "other", 1)
    assert not torch.equal(_out(model, x), _out(base, x))
    assert type(model.unload()) is type(base)


@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_refused_says_why(method):
    model = get_peft_model(_base("bert", "SEQ_CLS"), CONFIGS[method](task_type="SEQ_CLS"))
    name = {"dept": "DePT", "pasta": "PASTA"}[method]
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=rf"{name} cannot be merged: .* Use unload\(\)"):
            call()
    with pytest.raises(NotImplementedError, match=rf"{name} has nothing merged to undo. Use disable_adapter\(\)"):
        model.unmerge_adapter()
    with pytest.raises(NotImplementedError, match=f"{name} cannot combine adapters into one. Use adapter_names="):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    canine = transformers.CanineModel(
        transformers.CanineConfig(**{k: v for k, v in _SMALL.items() if k != "vocab_size"})
    )
    with pytest.raises(ValueError, match=f"{name}: model must embed its tokens by a table, but CanineModel has none"):
        get_peft_model(canine, CONFIGS[method]())
