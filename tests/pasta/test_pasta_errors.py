"""Refused models and calls, and their messages."""

import copy

import pasta_models as models
import pytest
import torch
import transformers
from peft import get_peft_model

from peft_kernels import PASTAConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_special_tokens": 0}, "num_special_tokens must be an integer of at least 1, got 0"),
        ({"num_special_tokens": 2.0}, "num_special_tokens must be an integer of at least 1, got 2.0"),
        ({"special_token_ids": []}, r"special_token_ids must be one token id or more, each at least 0, got \[\]"),
        (
            {"special_token_ids": [101, -1]},
            r"special_token_ids must be one token id or more, each at least 0, got \[101, -1\]",
        ),
        (
            {"special_token_ids": "[CLS]"},
            r"special_token_ids must be one token id or more, each at least 0, got '\[CLS\]'",
        ),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"init": "ones"}, r"init must be one of \('normal', 'zero'\), got 'ones'"),
        ({"overflow": "first"}, r"overflow must be one of \('error', 'last'\), got 'first'"),
    ],
)
def test_configuration(settings, message):
    with pytest.raises(ValueError, match=message):
        PASTAConfig(**settings)


def _model(kind, config=None, **settings):
    prefix = config or kind.split("For")[0].removesuffix("Model").removesuffix("LMHead")
    return getattr(transformers, kind)(getattr(transformers, f"{prefix}Config")(**settings))


_T5 = models.GENERIC["t5"][1]
_GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}
_LLAMA = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_BERT = models.FAMILIES["bert"][1]
_XLM = {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4}  # has lists of the parts of its layers
REFUSED = [
    (
        lambda: _model("T5ForConditionalGeneration", **_T5),
        "must be an encoder, but T5ForConditionalGeneration has a decoder as well",
    ),
    (lambda: _model("T5ForSequenceClassification", **_T5), "has a decoder as well"),
    (lambda: _model("GPT2LMHeadModel", **_GPT2), "must be an encoder, but GPT2LMHeadModel is a decoder"),
    (lambda: _model("LlamaForSequenceClassification", **_LLAMA), "is a decoder"),
    (lambda: _model("BertLMHeadModel", **_BERT, is_decoder=True), "is a decoder"),
    (lambda: _model("RobertaForSequenceClassification", **_BERT, is_decoder=True), "is a decoder"),
    (
        lambda: _model("XLMModel", **_XLM),
        r"must have one ModuleList of 2 layers that take hidden_states first, got none",
    ),
    (
        lambda: _model("XLMWithLMHeadModel", "XLM", **_XLM),
        r"XLMModel must have one ModuleList of 2 layers that take hidden_states first, got none",
    ),
    (lambda: _model("XLMWithLMHeadModel", "XLM", **_XLM, causal=True), "is a decoder"),
    (
        lambda: _model("SqueezeBertModel", **_BERT, embedding_size=32),
        r"must take hidden states \(B, S, d\), but take \(B, d, S\)",
    ),
    (
        lambda: _shared_layers(),
        "every layer of BertModel must be a module of its own, but encoder.layer has 1 for 3 passes",
    ),
]


def _shared_layers():
    model = models.stock("bert")
    layers = model.bert.encoder.layer
    for i in range(3):
        layers[i] = layers[0]
    return model


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_models(make, message):
    model = make()
    names, trainable, kinds = (
        set(vars(model)),
        [p.requires_grad for p in model.parameters()],
        [type(m) for m in model.modules()],
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, PASTAConfig(special_token_ids=[0, 2]))
    assert set(vars(model)) == names and [p.requires_grad for p in model.parameters()] == trainable
    assert [type(m) for m in model.modules()] == kinds


def test_not_of_transformers():
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear"):
        get_peft_model(torch.nn.Linear(2, 2), PASTAConfig(special_token_ids=[0]))


def test_special_tokens():
    with pytest.raises(ValueError, match=r"special_token_ids must lie in \[0, 99\), got \[0, 99\]"):
        models.adapted("bert", special_token_ids=[0, 99])
    with pytest.raises(
        ValueError,
        match="give special_token_ids, or a tokenizer_name_or_path .*: the model has no name_or_path to load",
    ):
        models.adapted("bert", special_token_ids=None)
    base = models.stock("bert")
    base.name_or_path = "nobody/nowhere"
    with pytest.raises(ValueError, match="no tokenizer could be loaded from 'nobody/nowhere'"):
        models.adapted("bert", base=base, special_token_ids=None)


def test_inputs():
    model = models.adapted("bert")
    x = models.inputs()
    embeds = torch.randn(*x["input_ids"].shape, models.WIDTH)
    with pytest.raises(ValueError, match="special tokens are found in input_ids, got inputs_embeds alone"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"attention_mask must be \(4, 11\), as input_ids, got \(4, 12\)"):
        model(input_ids=x["input_ids"], attention_mask=torch.ones(4, 12))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    with model.disable_adapter():
        assert torch.isfinite(model(inputs_embeds=embeds).logits).all()


def test_adapter_names():
    model = models.adapted("bert", "FEATURE_EXTRACTION")
    x = models.inputs()
    with pytest.raises(ValueError, match="one name for each of the 4 rows, got 2"):
        model(**x, adapter_names=["default", "default"])
    with pytest.raises(ValueError, match=r"among \['default', '__base__'\], got \['other'\]"):
        model(**x, adapter_names=["default", "other", "default", "default"])
    config = copy.deepcopy(model.peft_config["default"])
    config.overflow = "last"
    model.add_adapter("other", config)
    with pytest.raises(ValueError, match="must share num_special_tokens, special_token_ids, overflow and dropout, got"):
        model(**x, adapter_names=["default", "other", "default", "default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"one adapter must be active, got \['default', 'other'\]"):
        model(**x)
