"""Architectures with their own kind of position, window, padding or head."""

import copy

import dept_models as models
import pytest
import torch
import transformers
from accuracy import assert_no_near_tie, assert_same_tokens, assert_within_rounding
from dept_models import _BART, _BERT, _COMMON, _LLAMA, _SCALED, _T5, WIDTH
from peft import get_peft_model

from peft_kernels import DePTConfig

_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_OPT = dict(
    _COMMON,
    hidden_size=WIDTH,
    word_embed_proj_dim=16,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
_GEMMA3 = dict(_LLAMA, head_dim=8, num_key_value_heads=2, sliding_window=6)
_MODERNBERT = dict(_COMMON, **_SMALL, hidden_size=WIDTH, cls_token_id=4, sep_token_id=5, local_attention=8)
_DEBERTA = dict(_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)
_LED = dict(_BART, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=4)
CAUSAL = {
    "OPTForCausalLM": ("OPTConfig", _OPT),  # narrow embeddings, positions from the mask
    "BloomForCausalLM": ("BloomConfig", dict(_COMMON, hidden_size=WIDTH, n_layer=2, n_head=4)),  # ALiBi
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _GEMMA3),  # sliding window
    "Qwen2ForCausalLM": ("Qwen2Config", dict(_LLAMA, num_key_value_heads=2)),
    "RobertaForCausalLM": ("RobertaConfig", dict(_BERT, is_decoder=True)),  # positions from padding_idx + 1
}
OTHERS = {
    "MvpForConditionalGeneration": ("MvpConfig", _SCALED),  # scales outside the embedding
    "LEDForConditionalGeneration": ("LEDConfig", _LED),  # pads to its window
    "UMT5ForConditionalGeneration": ("UMT5Config", _T5),
    "BartForSequenceClassification": ("BartConfig", _BART),  # reads the state at the end token of input_ids
    "T5ForQuestionAnswering": ("T5Config", _T5),  # decodes the shifted input
    "T5ForTokenClassification": ("T5Config", _T5),
    "ElectraForSequenceClassification": ("ElectraConfig", dict(_BERT, embedding_size=16)),
    "DebertaV2ForTokenClassification": ("DebertaV2Config", _DEBERTA),  # relative positions
    "ModernBertForTokenClassification": ("ModernBertConfig", _MODERNBERT),  # rotary positions, local attention
    "LongformerForSequenceClassification": ("LongformerConfig", dict(_BERT, attention_window=4)),
}


def _stock(kind):
    config, settings = (CAUSAL | OTHERS)[kind]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()


def _inputs(kind, padding="right"):
    x = models.inputs(padding="none" if kind == "BartForSequenceClassification" else padding)
    x["input_ids"] = torch.cat([x["input_ids"][:, :-1], x["input_ids"][:, -1:].clamp_max(models.EOS)], 1)
    labels = {"labels": torch.randint(4, models.VOCAB, (3, 6))} if "ConditionalGeneration" in kind else {}
    return x | labels


def _main(output):
    return output["logits"] if "logits" in output else output["start_logits"]


def _shown(kind, value, x):
    """The values at tokens; those at padding are undefined."""
    return value if value.shape[:2] != x["attention_mask"].shape else value[x["attention_mask"].bool()]


@torch.no_grad()
@pytest.mark.parametrize("kind", CAUSAL | OTHERS)
def test_an_empty_adapter_is_the_stock_model(kind):
    """Without a prompt and with B = 0 there remains the embedding, scaled once."""
    stock = _stock(kind)
    model = get_peft_model(copy.deepcopy(stock), DePTConfig(num_virtual_tokens=0, r=2, max_length=16)).eval()
    x = _inputs(kind)
    assert_within_rounding(_shown(kind, _main(model(**x)), x), lambda: _shown(kind, _main(stock(**x)), x))


@torch.no_grad()
@pytest.mark.parametrize("kind", CAUSAL | OTHERS)
def test_rows_without_adapter_are_the_stock_model(kind):
    stock = _stock(kind)
    model = get_peft_model(copy.deepcopy(stock), DePTConfig(num_virtual_tokens=5, r=2, max_length=16)).eval()
    models.fill(model, "default", 1)
    x = _inputs(kind)
    mixed = _main(model(**x, adapter_names=["default", "__base__", "default"]))

    def apart():
        alone, base = _main(model(**x)), _main(stock(**x))
        return _shown(kind, torch.stack([alone[0], base[1], alone[2]]), x)

    assert_within_rounding(_shown(kind, mixed, x), apart)


@pytest.mark.parametrize("kind", CAUSAL)
def test_generated_tokens_do_not_depend_on_padding(kind):
    model = get_peft_model(_stock(kind), DePTConfig(num_virtual_tokens=5, r=2, max_length=16, position="token")).eval()
    models.fill(model, "default", 1)
    x = models.inputs(padding="left")
    kwargs = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    got = model.generate(**x, **kwargs)[:, 8:]
    rows = [{k: v[i : i + 1, mask] for k, v in x.items()} for i, mask in enumerate(x["attention_mask"].bool())]
    assert torch.equal(got, torch.cat([model.generate(**row, **kwargs)[:, -5:] for row in rows]))

    @torch.no_grad()
    def rereading():
        found = []
        for row in rows:
            ids = row["input_ids"]
            for _ in range(5):
                # without a mask, OPT counts positions in floats, whose rounding is not that of a sum
                ids = torch.cat(
                    [ids, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:].argmax(-1)], 1
                )
            found.append(ids[:, -5:])
        return torch.cat(found)

    assert_same_tokens(got, rereading)


def test_multiple_choice():
    torch.manual_seed(0)
    model = get_peft_model(
        transformers.BertForMultipleChoice(transformers.BertConfig(**_BERT)),
        DePTConfig(num_virtual_tokens=5, max_length=16),
    )
    assert model(**{k: v[None] for k, v in models.inputs().items()}).logits.shape == (1, 3)


def test_masks_that_a_model_does_not_read():
    config = transformers.FNetConfig(**_BERT)
    model = get_peft_model(
        transformers.FNetForSequenceClassification(config), DePTConfig(num_virtual_tokens=5, max_length=16)
    )
    with pytest.raises(ValueError, match="cannot share a batch with others in FNetModel"):
        model(input_ids=models.inputs()["input_ids"], adapter_names=["default", "__base__", "default"])


def test_prompts_in_decoder_on_top():
    """``peft_kernels.pid`` enabled on the adapted model."""
    from peft_kernels import pid

    stock, model = models.pair("t5")
    x = models.inputs()
    expected = model.generate(**x, max_new_tokens=5, num_beams=3)
    assert_no_near_tie(lambda: model.generate(**x, max_new_tokens=5, num_beams=3), expected)
    pid.enable(model)
    assert torch.equal(model.generate(**x, max_new_tokens=5, num_beams=3), expected)
    pid.disable(model)
    assert torch.equal(model.generate(**x, max_new_tokens=5, num_beams=3), expected)
    assert type(model.unload()) is type(stock)
