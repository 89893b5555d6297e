"""Refused models and calls, and their messages."""

import copy

import dept_models as models
import pytest
import torch
import transformers
from accuracy import assert_within_rounding
from dept_models import adapted, inputs
from peft import get_peft_model

from peft_kernels import DePTConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": -1}, "num_virtual_tokens must be an integer of at least 0, got -1"),
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"max_length": 2.5}, "max_length must be an integer of at least 1, got 2.5"),
        ({"position": "left"}, r"position must be one of \('padded', 'token'\), got 'left'"),
        ({"init_text": "classify"}, "init_text='classify' needs tokenizer_name_or_path"),
        ({"init_token_ids": []}, "init_token_ids must have at least one token id"),
    ],
)
def test_configuration(settings, message):
    with pytest.raises(ValueError, match=message):
        DePTConfig(**settings)


def test_longer_than_max_length():
    for name in ("t5", "gpt2"):
        model = adapted(name)
        x = inputs(n=models.S + 1)
        with pytest.raises(ValueError, match="the input must have at most 12 tokens, the adapter's max_length, got 13"):
            model(**x, labels=x["input_ids"])
        with pytest.raises(ValueError, match="at most 12 tokens.*max_length, got 13"):
            model.generate(**x, max_new_tokens=2)


@pytest.mark.parametrize(("name", "limit"), [("bart", 64), ("gpt2", 64), ("bert-masked", 64), ("roberta-qa", 63)])
def test_beyond_the_position_table(name, limit):
    model = adapted(name, max_length=100, num_virtual_tokens=10)
    fits = inputs(n=limit - 10, padding="none")
    model(**fits)
    with pytest.raises(
        ValueError,
        match=f"10 prompt rows and {limit - 9} tokens make {limit + 1} columns, but the model has {limit} positions",
    ):
        model(**inputs(n=limit - 9, padding="none"))


def test_relative_positions_have_no_table():
    model = adapted("t5", max_length=600)
    model(**inputs(n=600, padding="none"), labels=torch.ones(3, 1, dtype=torch.long))


def test_masks():
    model = adapted("gpt2")
    x = inputs()
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, 8\), got \(3, 1, 8, 8\)"):
        model(input_ids=x["input_ids"], attention_mask=torch.ones(3, 1, 8, 8))
    with pytest.raises(ValueError, match="padded on the right"):
        adapted("bert-masked")(**inputs(padding="left"))


def test_adapter_names():
    model = adapted("t5")
    x = inputs()
    labels = models.targets("t5", x)
    with pytest.raises(ValueError, match="one name for each of the 3 rows, got 2"):
        model(**x, **labels, adapter_names=["default", "default"])
    with pytest.raises(ValueError, match=r"among \['default', '__base__'\], got \['other'\]"):
        model(**x, **labels, adapter_names=["default", "other", "default"])
    config = copy.deepcopy(model.peft_config["default"])
    config.r = 2
    model.add_adapter("other", config)
    with pytest.raises(ValueError, match="must share num_virtual_tokens, r, "):
        model(**x, **labels, adapter_names=["default", "other", "default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"one adapter must be active, got \['default', 'other'\]"):
        model(**x, **labels)


def test_models():
    settings = {"num_virtual_tokens": 2, "r": 2, "max_length": 8}
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear"):
        get_peft_model(torch.nn.Linear(2, 2), DePTConfig(**settings))
    whisper = transformers.WhisperConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        pad_token_id=0,
    )
    with pytest.raises(ValueError, match="main input of WhisperForConditionalGeneration is 'input_features'"):
        get_peft_model(transformers.WhisperForConditionalGeneration(whisper), DePTConfig(**settings))
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    with pytest.raises(ValueError, match="model must embed its tokens by a table, but CanineModel has none"):
        get_peft_model(transformers.CanineModel(transformers.CanineConfig(**small)), DePTConfig(**settings))
    with pytest.raises(
        ValueError, match="the input embedding of IBertModel must be an nn.Embedding, got QuantEmbedding"
    ):
        get_peft_model(transformers.IBertModel(transformers.IBertConfig(**small)), DePTConfig(**settings))
    with pytest.raises(
        ValueError, match="BrosModel must take input_ids alone, but raises ValueError .You have to specify bbox"
    ):
        get_peft_model(transformers.BrosModel(transformers.BrosConfig(**small)), DePTConfig(**settings))


class LooksAtTokens(transformers.LlamaForCausalLM):
    """A user-defined model."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        output = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if input_ids is not None:
            output.logits = output.logits + input_ids[..., None]
        return output


def test_refused_model_is_left_alone():
    """The probe leaves nothing behind either: not on the model, not in its modes, not in the random state."""
    model = LooksAtTokens(transformers.LlamaConfig(**models.MODELS["llama"][1]))
    model.lm_head.eval()

    def state():
        modules = [
            (m.training, set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ]
        return modules, [p.requires_grad for p in model.parameters()], torch.get_rng_state().tolist()

    before = state()
    with pytest.raises(ValueError, match="LooksAtTokens reads input_ids for more than their embeddings"):
        get_peft_model(model, DePTConfig())
    assert state() == before


def test_initialisation():
    """A is uniform in 1 / sqrt(r), B is zero; P is made of tokens, repeated or cut, as the first layer reads them, and
    is the same after loading.
    """
    for name in ("t5", "pegasus"):
        base = models.stock(name)
        model = get_peft_model(
            base, DePTConfig(num_virtual_tokens=5, r=4, max_length=9, init_token_ids=[7, 8], task_type="SEQ_2_SEQ_LM")
        )
        p, a, b = models.parameters(model)
        assert_within_rounding(p, lambda: models.MODELS[name][5] * base.get_input_embeddings().weight[[7, 8, 7, 8, 7]])
        assert a.shape == (9, 4) and a.abs().max() <= 0.5 and a.std() > 0.2 and not b.any()
    with pytest.raises(ValueError, match=r"init_token_ids must lie in \[0, 99\), got \[99\]"):
        get_peft_model(models.stock("t5"), DePTConfig(init_token_ids=[99]))


def test_initialisation_from_a_text(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "is": 5, "it": 6, "good": 7}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    base = models.stock("t5")
    config = DePTConfig(
        num_virtual_tokens=5, r=4, max_length=9, init_text="is it good", tokenizer_name_or_path=str(tmp_path)
    )
    model = get_peft_model(base, config)
    assert config.init_token_ids == [5, 6, 7]
    assert torch.equal(models.parameters(model)[0], base.get_input_embeddings().weight[[5, 6, 7, 5, 6]])
