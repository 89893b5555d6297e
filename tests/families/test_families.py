"""A dozen of the classes in ``every_class.py``, and cases outside its tables: images, modes, weights that are loaded
later.
"""

import copy

import checks
import pytest
import tiny
import torch
import transformers
from accuracy import assert_within_rounding
from peft import get_peft_model

from peft_kernels import DePTConfig, PASTAConfig

EMPTY = {"num_virtual_tokens": 0, "r": 2, "max_length": 16}
# class -> settings: models that scale their embeddings, or read their ids
EQUAL = {
    "AfmoeForCausalLM": {},
    "CTRLLMHeadModel": {},
    "DPRQuestionEncoder": {},
    "EsmForMaskedLM": {},
    "EsmForTokenClassification": {"token_dropout": True},
    "FalconH1ForCausalLM": {},
    "GraniteForCausalLM": {},
    "HyperCLOVAXForCausalLM": {},
    "LongformerForSequenceClassification": {},
    "MPNetForMaskedLM": {},
    "PegasusForConditionalGeneration": {},
    "Qwen2VLForConditionalGeneration": {},
    "RobertaForCausalLM": {},
    "XLNetLMHeadModel": {},
    "xLSTMForCausalLM": {},
}
REFUSED = {
    "CanineModel": "must embed its tokens by a table, but CanineModel has none",
    "CLIPTextModel": "the prompt enters through inputs_embeds, which CLIPTextModel does not take",
    "DeepseekV4ForCausalLM": "reads input_ids for more than their embeddings",
    "FSMTForConditionalGeneration": "reads input_ids for more than their embeddings",
    "Gemma3nForCausalLM": "reads input_ids for more than their embeddings",
    "Gemma4ForCausalLM": "reads input_ids for more than their embeddings",
    "IBertModel": "must be an nn.Embedding, got QuantEmbedding",
    "LxmertModel": "must take input_ids alone, but raises ValueError",
}


def built(name, **settings):
    if not hasattr(transformers, name):
        pytest.skip(f"no {name} in transformers {transformers.__version__}")
    kind = getattr(transformers, name)
    return tiny.build(kind, kind.config_class, **settings)


@pytest.mark.parametrize("name", EQUAL)
def test_equal(name):
    base = built(name, **EQUAL[name])
    for check in (checks.dept_that_changes_nothing, checks.dept_by_formula):
        try:
            check(base)
        except checks.Refused as error:
            assert str(error).startswith("generate: ")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        get_peft_model(built(name), DePTConfig(**EMPTY))


@pytest.mark.parametrize("name", ["EsmForMaskedLM", "BertForTokenClassification"])
def test_pasta(name):
    checks.pasta(built(name))


def test_pasta_adds_to_one_stream():
    with pytest.raises(
        ValueError, match=r"layers of HYV4VLTextModel must take hidden states \(B, S, d\), but take \(B, S, 4, d\)"
    ):
        get_peft_model(built("HYV4VLTextModel"), PASTAConfig(num_special_tokens=1, special_token_ids=[1]))


def test_longformer_up_to_its_last_position():
    """It pads to its window: without ids, the positions of the padding would run past the table."""
    base = built("LongformerModel", max_position_embeddings=64, attention_window=16)
    model = get_peft_model(copy.deepcopy(base), DePTConfig(**EMPTY | {"max_length": 64})).eval()
    ids = torch.randint(10, 90, (2, 61))
    assert_within_rounding(model(input_ids=ids).last_hidden_state, lambda: base(input_ids=ids).last_hidden_state)


def test_padding_without_a_mask():
    """RoBERTa's positions skip padding tokens, whatever the mask says."""
    base = built("RobertaModel")
    model = get_peft_model(copy.deepcopy(base), DePTConfig(**EMPTY)).eval()
    ids = checks.inputs(base)["input_ids"]
    assert_within_rounding(model(input_ids=ids).last_hidden_state, lambda: base(input_ids=ids).last_hidden_state)


def with_images(base, token):
    x = checks.inputs(base, padding="left")
    x["input_ids"][:, 4:8] = token
    x["attention_mask"][:, 4:8] = 1
    return x | {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(4))}


@torch.no_grad()
def test_images_take_the_place_of_their_tokens():
    base = built("LlavaForConditionalGeneration")
    x = with_images(base, base.config.image_token_id)
    model = get_peft_model(
        copy.deepcopy(base), DePTConfig(num_virtual_tokens=checks.M, r=checks.R, max_length=checks.S)
    ).eval()
    prompt, update = checks.filled(model)

    def formula():
        with checks.prompted(base, prompt, update, 0, 1.0):
            return checks.run(base, x)

    checks.assert_equal(checks.run(model, x), formula, x["attention_mask"].bool(), "images")
    one = {name: value[:1] for name, value in x.items()}  # not padded
    tokens = model.generate(**one, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = one["input_ids"]
    for _ in range(3):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=one["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, ids)


@torch.no_grad()
def test_positions_of_images_come_from_ids():
    base = built("Qwen2VLForConditionalGeneration")
    model = get_peft_model(copy.deepcopy(base), DePTConfig(**EMPTY)).eval()
    x = checks.inputs(base)
    # a call with images, of another batch, leaves it so
    model.base_model.model.model.rope_deltas = torch.full((2, 1), 5)
    checks.assert_equal(checks.run(model, x), lambda: checks.run(base, x), x["attention_mask"].bool(), "text")
    images = {"pixel_values": torch.randn(4, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    for call in (model, model.generate):
        with pytest.raises(
            ValueError, match="must be text, because it takes positions of images and videos from input_ids"
        ):
            call(**x, **images)


def test_a_part_that_looks_at_ids():
    """The encoder around it passes the ids on and gets the prompt."""
    base = built("DPRQuestionEncoder")
    base.question_encoder.bert_model = built("RobertaModel")
    for check in (checks.dept_that_changes_nothing, checks.dept_by_formula):
        check(base)
    model = get_peft_model(copy.deepcopy(base), DePTConfig(**EMPTY)).base_model.model
    assert model.dept.reading.by_ids
    with pytest.raises(ValueError, match="RobertaModel alone has no prompt; call DPREncoder"):
        model.question_encoder.bert_model(input_ids=torch.tensor([[5, 6]]))


def test_weights_that_come_later():
    """The model is made on meta and loaded afterwards: it is probed at its first forward."""
    base = built("GraniteForCausalLM")
    with torch.device("meta"):
        later = type(base)(base.config)
    model = get_peft_model(later, DePTConfig(**EMPTY | {"num_virtual_tokens": 3})).eval()
    now = get_peft_model(copy.deepcopy(base), DePTConfig(**EMPTY | {"num_virtual_tokens": 3})).eval()
    checks.filled(now)
    model.load_state_dict(now.state_dict(), assign=True)
    for name, buffer in base.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.base_model.model.get_submodule(owner), leaf, buffer)
    x = checks.inputs(base)
    assert_within_rounding(model(**x).logits, lambda: now(**x).logits)


def test_scale_in_half_precision():
    """The factor measured in bfloat16 is the model's."""
    base = built("GraniteForCausalLM").to(torch.bfloat16)
    model = get_peft_model(base, DePTConfig(**EMPTY))
    assert model.base_model.model.dept.reading.input_scale == 3.0
