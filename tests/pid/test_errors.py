"""Unsupported calls raise errors that name the expected and the given values."""

import pytest
import torch
import transformers
from models import TEXT_FAMILIES, build, inputs, shared

from peft_kernels import pid

SMALL = {"vocab_size": 20, "d_model": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SMALL |= {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
SMALL |= {
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def unsupported(kind):
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
    if kind == "prophetnet":
        heads = {
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "num_encoder_attention_heads": 2,
            "num_decoder_attention_heads": 2,
            "hidden_size": 16,
        }
        return transformers.ProphetNetForConditionalGeneration(
            transformers.ProphetNetConfig(
                vocab_size=20, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, **heads
            )
        )
    if kind == "fsmt":
        fsmt = {k: v for k, v in SMALL.items() if k != "vocab_size"}
        return transformers.FSMTForConditionalGeneration(
            transformers.FSMTConfig(langs=["a", "b"], src_vocab_size=20, tgt_vocab_size=20, **fsmt)
        )
    if kind == "led":
        led = {k: v for k, v in SMALL.items() if k != "max_position_embeddings"}
        return transformers.LEDForConditionalGeneration(
            transformers.LEDConfig(
                max_encoder_position_embeddings=32, max_decoder_position_embeddings=32, attention_window=4, **led
            )
        )
    return transformers.MvpForConditionalGeneration(transformers.MvpConfig(**SMALL))


@pytest.mark.parametrize("kind", ["led", "fsmt", "prophetnet", "mvp", "gpt2"])
def test_unsupported_families_are_named(kind):
    model = unsupported(kind)
    before = dict(vars(model))
    with pytest.raises(ValueError, match=f"model_type '{kind}' is not supported; supported are t5, .*bart, .*whisper"):
        pid.enable(model)
    assert vars(model).keys() == before.keys() and not pid.is_enabled(model)


def test_what_is_no_model_is_named():
    with pytest.raises(ValueError, match="a Linear is not supported"):
        pid.enable(torch.nn.Linear(2, 2))


def test_a_family_without_its_head_is_refused_or_works():
    """EncoderDecoderModel around a decoder whose cross-attention is unknown."""
    with pytest.raises(ValueError, match="model_type 't5'.*not supported|cross-attention"):
        pid.enable(
            transformers.T5EncoderModel(
                transformers.T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16, vocab_size=20)
            )
        )


def test_other_attention_implementations_are_refused():
    model = build("t5")
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"\['flash_attention_2'\] are not supported.*'sdpa'.* or 'eager'"):
        pid.enable(model)
    assert not pid.is_enabled(model)


PROMPTS = [
    ([], ValueError, "prompts must be a list that is not empty"),
    (None, ValueError, "prompts must be a list that is not empty, got None"),
    ("ask", ValueError, "prompts must be a list that is not empty"),
    ([[], [[]], []], None, None),
    ([[[5]], [[6]]], ValueError, "one list per input, got 2 lists for 3 inputs"),
    ([[[5.0]], [[6]], [[7]]], TypeError, r"lists of int token ids, got \[5.0\]"),
    ([[5, True]], TypeError, "lists of int token ids"),
    (["ab", "cd"], TypeError, "lists of int token ids, got 'ab'"),
    ([5, 6], TypeError, "lists of int token ids, got 5"),
    ([[[5], 6], [[7]], [[8]]], TypeError, "lists of int token ids, got 6"),
    ([[5], [[6]], [[7]]], TypeError, "lists of int token ids, got 5"),
    ([[[[5]]], [[6]], [[7]]], TypeError, "lists of int token ids"),
    ([[5, "6"]], TypeError, "lists of int token ids"),
]


@pytest.mark.parametrize(("prompts", "kind", "message"), PROMPTS, ids=[repr(p[0]) for p in PROMPTS])
def test_prompts(prompts, kind, message, swapped):
    model = swapped(shared("t5"))
    if kind is None:
        assert [len(one) for one in pid.generate(model, prompts=prompts, **inputs(), max_new_tokens=2).sequences] == [
            0,
            1,
            0,
        ]
        return
    with pytest.raises(kind, match=message):
        pid.generate(model, prompts=prompts, **inputs(), max_new_tokens=2)
    with pytest.raises(kind, match=message):
        pid.forward(model, prompts=prompts, targets=[[[5]]] * 3, **inputs())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "targets must be a list that is not empty"),
        ([[5], [6], [7]], r"targets must be nested: targets\[i\]\[u\]"),
        ([[[5]], [[6]]], "one list per input, got 2 lists for 3"),
        ([[[5]], [[6], [7]], [[8]]], r"every prompt needs a target, got \[1, 1, 1\] prompts and \[1, 2, 1\] targets"),
        ([[[]], [[]], [[]]], "targets must have at least one token"),
    ],
    ids=str,
)
def test_targets(targets, message, swapped):
    with pytest.raises(ValueError, match=message):
        pid.forward(swapped(shared("t5")), prompts=[[5]], targets=targets, **inputs())


def test_not_enabled():
    model = shared("bart")
    with pytest.raises(ValueError, match=r"pid.generate: the model is not enabled; call pid.enable"):
        pid.generate(model, prompts=[[5]], **inputs())
    with pytest.raises(ValueError, match=r"pid.forward: the model is not enabled"):
        pid.forward(model, prompts=[[5]], targets=[[[5]]] * 3, **inputs())


@pytest.mark.parametrize(
    "ids", [torch.zeros(4, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long)], ids=["flat", "none"]
)
def test_inputs(ids, swapped):
    with pytest.raises(ValueError, match=r"input_ids must be \(b, n\) with b > 0, got"):
        pid.generate(swapped(shared("t5")), ids, [[5]])


@pytest.mark.parametrize("family", ["bart", "encoder-decoder"])
def test_prompts_longer_than_the_positions(family, swapped):
    model = swapped(shared(family))
    with pytest.raises(ValueError, match="the decoder has 64 positions, but a prompt of 70 tokens .* needs 75"):
        pid.generate(model, prompts=[[5] * 70, [6]], **inputs(), max_new_tokens=4)
    with pytest.raises(ValueError, match="the decoder has 64 positions, but a prompt of 64 tokens"):
        pid.forward(model, prompts=[[5] * 64], targets=[[[6]]] * 3, **inputs())


ROWS = [
    (4, None, "multiple of the encoder's inputs, got 4 rows for 3 inputs: pass encoder_index"),
    (4, [0, 1, 1], r"encoder_index must be \(4,\) integers.*got \(3,\)"),
    (3, [0.0, 1.0, 2.0], r"encoder_index must be \(3,\) integers.*float32"),
    (4, [0, 2, 1, 2], r"encoder_index must not decrease, got \[0, 2, 1, 2\]"),
    (4, [0, 1, 2, 3], r"encoder_index must lie in \[0, 3\), got values from 0 to 3"),
    (4, [-1, 1, 2, 2], r"encoder_index must lie in \[0, 3\), got values from -1 to 2"),
]


@pytest.mark.parametrize(("rows", "index", "message"), ROWS, ids=[r[2][:30] for r in ROWS])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_rows(family, rows, index, message, swapped):
    model, ids = swapped(shared(family)), torch.randint(4, 99, (rows, 3))
    extra = {} if index is None else {"encoder_index": torch.tensor(index)}
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs(), decoder_input_ids=ids, max_new_tokens=2, **extra)
    with pytest.raises(ValueError, match=message):
        model(**inputs(), decoder_input_ids=ids, **extra)
    assert model(**inputs(), decoder_input_ids=ids[:3]).logits.shape[0] == 3  # the failed calls leave nothing behind


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_masks_of_another_shape(family, swapped):
    model, ids, x = swapped(shared(family)), torch.randint(4, 99, (6, 3)), inputs()
    with torch.no_grad():
        encoded = model.get_encoder()(**x)
    with pytest.raises(ValueError, match=r"attention_mask must be \(3, 9\), one row per encoder input, got \(6, 9\)"):
        model(encoder_outputs=encoded, attention_mask=x["attention_mask"].repeat(2, 1), decoder_input_ids=ids)
