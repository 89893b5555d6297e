"""``pid.generate`` with many prompts of one input, against every stream decoded alone by stock transformers."""

import pytest
import torch
from accuracy import assert_within_rounding
from models import (
    RELATIVE,
    TEXT_FAMILIES,
    UMT5_SDPA_IS_CAUSAL,
    VOCAB,
    build,
    decided,
    inputs,
    shared,
    start_of,
    stock_streams,
)

from peft_kernels import pid

SAME = [[5, 6], [7], [8, 9, 10, 11], []]
RAGGED = [[[5, 6]], [[7], [8, 9, 10, 11], []], [[12, 13, 14], [15]]]
MODES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "beams-returned": {"num_beams": 4, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "static-beams": {"cache_implementation": "static", "num_beams": 3},
}


def log_probs(model, x, i, prompt, tokens):
    """Log-probabilities of one stream's tokens, from one stock forward without a cache."""
    ids = torch.tensor([[start_of(model), *prompt, *tokens]])
    with torch.no_grad():
        logits = model(
            **{k: v[i : i + 1] for k, v in x.items()},
            decoder_input_ids=ids,
            decoder_attention_mask=torch.ones_like(ids),
        ).logits
    return logits.log_softmax(-1)[0, len(prompt) : -1].gather(1, ids[0, len(prompt) + 1 :, None])[:, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompts", [SAME, RAGGED], ids=["same", "ragged"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_tokens_are_stock(family, prompts, mode, swapped):
    model, x, kwargs = shared(family), inputs(), dict(MODES[mode], max_new_tokens=10)
    expected = stock_streams(model, x, RAGGED if prompts is RAGGED else [SAME] * 3, **kwargs)
    assert pid.generate(swapped(model), prompts=prompts, **x, **kwargs).sequences == expected


@pytest.mark.parametrize("mask", ["full", "left", "holes", None])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_encoder_masks(family, mask, swapped):
    model, x = shared(family), inputs(mask=mask or "full")
    if mask is None:
        x.pop("attention_mask")
    expected = stock_streams(model, x, RAGGED, max_new_tokens=8)
    assert pid.generate(swapped(model), prompts=RAGGED, **x, max_new_tokens=8).sequences == expected


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["t5", "umt5", "bart", "marian", "m2m_100", "encoder-decoder"])
def test_scores_are_log_probabilities_of_the_tokens(family, attention, kwargs, swapped):
    """Scores reveal wrong positions even if the tokens agree by chance."""
    if (family, attention) == ("umt5", "sdpa") and not UMT5_SDPA_IS_CAUSAL:
        pytest.skip("stock is not causal here")
    model, x = shared(family, attention), inputs()
    truth_model = build(family, attention).double()
    out = pid.generate(swapped(model), prompts=RAGGED, **x, **kwargs, max_new_tokens=8, output_scores=True)
    model = build(family, attention)

    def stock(model):
        streams = [list(zip(*of_input)) for of_input in zip(RAGGED, out.sequences)]
        return [[log_probs(model, x, i, *stream) for stream in of_input] for i, of_input in enumerate(streams)]

    assert all(score.dtype == torch.float32 for scores in out.scores for score in scores)
    assert_within_rounding(out.scores, lambda: stock(model), stock(truth_model))


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_scores_in_the_nesting_of_returned_sequences(family, swapped):
    out = pid.generate(
        swapped(shared(family)),
        prompts=RAGGED,
        **inputs(),
        num_beams=4,
        num_return_sequences=2,
        max_new_tokens=5,
        output_scores=True,
    )
    assert [[len(s) for s in one] for one in out.scores] == [[2], [2] * 3, [2] * 2]
    assert all(
        len(s) == len(t) for ss, ts in zip(out.scores, out.sequences) for s2, t2 in zip(ss, ts) for s, t in zip(s2, t2)
    )
    assert pid.generate(shared(family), prompts=SAME, **inputs(), max_new_tokens=2).scores is None


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_sampling_draws_what_repeated_inputs_draw(family, swapped):
    """Prompts of one length give the same rows in the same order, so the same random numbers."""
    model, x, prompts = shared(family), inputs(), [[5, 6], [7, 8]]
    kwargs = {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0, "max_new_tokens": 8}
    ids = torch.tensor([[start_of(model), *p] for p in prompts] * 3)
    torch.manual_seed(4)
    repeated = {k: v.repeat_interleave(2, 0) for k, v in x.items()}
    repeated |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    rows = decided(model, lambda: model.generate(**repeated, **kwargs))
    torch.manual_seed(4)
    out = pid.generate(swapped(model), prompts=prompts, **x, **kwargs)
    assert torch.equal(out.output.sequences, rows)
    assert [[len(u) for u in one] for one in out.sequences] == [[3, 3]] * 3


@pytest.mark.parametrize("family", ["t5", "umt5", "bart", "encoder-decoder"])
def test_one_prompt_each(family, swapped):
    """Nothing is shared, but prompts differ in length: positions must still be right."""
    model, x, prompts = shared(family), inputs(), [[[5, 6, 7]], [[7]], [[8, 9]]]
    expected = stock_streams(model, x, prompts, max_new_tokens=8)
    for cache in ("dynamic", "static"):
        assert (
            pid.generate(swapped(model), prompts=prompts, **x, max_new_tokens=8, cache_implementation=cache).sequences
            == expected
        )


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder-wide"])
def test_inputs_without_prompts(family, swapped):
    model, x, prompts = shared(family), inputs(), [[], [[7], [8, 9]], []]
    expected = stock_streams(model, x, prompts, max_new_tokens=8)
    assert pid.generate(swapped(model), prompts=prompts, **x, max_new_tokens=8).sequences == expected


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_use_cache_false(family, swapped):
    """Without a cache prompts of equal length are exact; those of different lengths are refused, because positions come
    from the cache.
    """
    model, x, prompts = shared(family), inputs(), [[5, 6], [7, 8]]
    expected = stock_streams(model, x, [prompts] * 3, max_new_tokens=6)
    assert pid.generate(swapped(model), prompts=prompts, **x, max_new_tokens=6, use_cache=False).sequences == expected
    with pytest.raises(ValueError, match="use_cache=False"):
        pid.generate(model, prompts=SAME, **x, max_new_tokens=6, use_cache=False)


@pytest.mark.parametrize("family", ["bart", "encoder-decoder"])
def test_prompts_up_to_the_last_position(family, swapped):
    model, x = shared(family), inputs(1)
    prompt = torch.randint(4, VOCAB, (64 - 1 - 3,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = stock_streams(model, x, [[prompt, [5]]], max_new_tokens=3)
    assert pid.generate(swapped(model), prompts=[prompt, [5]], **x, max_new_tokens=3).sequences == expected
    with pytest.raises(ValueError, match="64 positions.*61 tokens.*needs 65"):
        pid.generate(model, prompts=[[*prompt, 5]], **x, max_new_tokens=3)


def test_relative_positions_have_no_limit(swapped):
    prompt = [5] * 700
    model = shared(RELATIVE[0])
    expected = stock_streams(model, inputs(1), [[prompt, [6]]], max_new_tokens=3)
    assert pid.generate(swapped(model), prompts=[prompt, [6]], **inputs(1), max_new_tokens=3).sequences == expected


def test_a_generation_config_of_the_callers(swapped):
    model, x = shared("t5"), inputs()
    config = type(model.generation_config)(
        max_new_tokens=6, num_beams=3, num_return_sequences=2, decoder_start_token_id=3, pad_token_id=0, eos_token_id=1
    )
    plain = pid.generate(
        swapped(model),
        prompts=SAME,
        **x,
        max_new_tokens=6,
        num_beams=3,
        num_return_sequences=2,
        decoder_start_token_id=3,
    )
    assert pid.generate(model, prompts=SAME, **x, generation_config=config).sequences == plain.sequences
    assert config.num_beams == 3 and model.generation_config.num_beams in (None, 1)
