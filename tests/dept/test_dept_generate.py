"""Generation: encoder-decoder models against stock ``generate`` from the formula's embeddings, causal models against
rereading the whole sequence.
"""

import copy
from functools import cache

import dept_models as models
import pytest
import torch
from accuracy import WithinRounding, assert_no_near_tie, assert_same_tokens, assert_within_rounding
from transformers import GenerationConfig

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 4, "num_return_sequences": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


def _by_formula(name, stock, model, x, **kwargs):
    p = models.parameters(model)
    embeddings = models.MODELS[name][5] * stock.get_input_embeddings().weight[x["input_ids"]]
    mask = models.insert(x["attention_mask"], torch.ones(len(embeddings), models.M, dtype=torch.long), False)
    return stock.generate(inputs_embeds=models.widened(embeddings, *p, False), attention_mask=mask, **kwargs)


@cache
def _formula_tokens(name, mode):
    """The formula's tokens, which rounding does not decide; they do not depend on the task type and the cache."""
    stock, model = models.pair(name)

    def run():
        return _by_formula(name, stock, model, models.inputs(), max_new_tokens=6, **MODES[mode])

    tokens = run()
    assert_no_near_tie(run, tokens)
    return tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["t5", "bart", "pegasus", "m2m_100", "t5-untyped"])
def test_encoder_decoder(name, mode):
    got = models.adapted(name).generate(**models.inputs(), max_new_tokens=6, **MODES[mode])
    assert torch.equal(got, _formula_tokens(name.removesuffix("-untyped"), "greedy" if mode == "static" else mode))


@cache
def _tokens_by_rereading(name, padding, **config):
    """Tokens each from a forward over the whole sequence so far; rounding does not decide them."""
    model, x = models.adapted(name, **config), models.inputs(padding=padding)

    @torch.no_grad()
    def run():
        ids, mask = x["input_ids"], x["attention_mask"]
        for _ in range(6):
            token = model(input_ids=ids, attention_mask=mask).logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        return ids

    tokens = run()
    assert_no_near_tie(run, tokens)
    return tokens


@pytest.mark.parametrize("mode", ["greedy", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", [*models.CAUSAL, "gpt2-untyped"])
def test_causal_greedy_equals_rereading_the_sequence(name, padding, mode):
    """A token gets the update of its position whether it is part of the input, as in training, or generated."""
    config = {"position": "token", "max_length": 30}
    model, x = models.adapted(name, **config), models.inputs(padding=padding)
    got = model.generate(**x, max_new_tokens=6, eos_token_id=None, pad_token_id=0, **MODES[mode])
    assert torch.equal(got, _tokens_by_rereading(name.removesuffix("-untyped"), padding, **config))


@pytest.mark.parametrize("name", models.CAUSAL)
def test_causal_columns_are_counted_alike_in_training_and_generation(name):
    model = models.adapted(name, max_length=30)
    got = model.generate(**models.inputs(padding="none"), max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    assert torch.equal(got, _tokens_by_rereading(name, "none", max_length=30))


@pytest.mark.parametrize("name", models.CAUSAL)
def test_causal_input_is_the_formula(name):
    """The first token equals that of stock generate from the formula's embeddings."""
    stock, model = models.pair(name)
    x = models.inputs(padding="left")
    kwargs = {"max_new_tokens": 1, "pad_token_id": 0}
    assert_same_tokens(model.generate(**x, **kwargs)[:, 8:], lambda: _by_formula(name, stock, model, x, **kwargs))


@pytest.mark.parametrize("name", models.CAUSAL)
def test_causal_beams(name):
    """The score of a returned beam equals that of rereading it."""
    model = models.adapted(name, position="token", max_length=30)
    x = models.inputs(padding="left")
    out = model.generate(
        **x, max_new_tokens=5, num_beams=3, num_return_sequences=2, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    mask = torch.cat([x["attention_mask"].repeat_interleave(2, 0), torch.ones(6, 5, dtype=torch.long)], 1)

    def scores():
        logits = model(input_ids=out.sequences, attention_mask=mask).logits[:, 7:-1].log_softmax(-1)
        return logits.gather(2, out.sequences[:, 8:, None]).sum((1, 2)) / 5

    assert_within_rounding(out.sequences_scores, scores)


def test_tokens_beyond_max_length_get_their_embedding_alone():
    model = models.adapted("llama", max_length=10)
    longer = models.adapted("llama", max_length=30)
    with torch.no_grad():
        for p, q in zip(models.parameters(longer), models.parameters(model)):
            p.zero_()
            p[: len(q)] = q
    x = models.inputs(padding="none")
    kwargs = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    assert model.base_model.model.dept.configs["default"].scale == longer.base_model.model.dept.configs["default"].scale
    assert_same_tokens(model.generate(**x, **kwargs), lambda: longer.generate(**x, **kwargs))


def test_lengths_count_tokens():
    stock, model = models.pair("gpt2")
    x = models.inputs(padding="none")
    for kwargs in (
        {"max_length": 11},
        {"generation_config": GenerationConfig(max_length=11, min_length=10)},
        {"max_new_tokens": 3},
        {},
    ):
        kwargs["pad_token_id"] = 0
        got, expected = (m.generate(**x, **kwargs, eos_token_id=None).shape for m in (model, stock))
        assert got == expected


def test_processors_see_the_tokens():
    model = models.adapted("gpt2")
    x = models.inputs(padding="none")
    got = model.generate(**x, max_new_tokens=8, no_repeat_ngram_size=1, eos_token_id=None, pad_token_id=0)
    assert all(len(set(row[8:])) == 8 and not set(row[8:]) & set(row[:8]) for row in got.tolist())


def test_without_a_mask_padding_tokens_are_masked():
    stock, model = models.pair("gpt2")
    x = models.inputs(padding="left")
    kwargs = {"max_new_tokens": 4, "pad_token_id": 0}
    assert_same_tokens(model.generate(x["input_ids"], **kwargs), lambda: model.generate(**x, **kwargs))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_from_inputs_embeds(name):
    stock, model = models.pair(name)
    x = models.inputs(padding="none")
    embeddings = stock.get_input_embeddings()(x["input_ids"])
    kwargs = {"max_new_tokens": 5, "pad_token_id": 0}
    shown = slice(0 if name == "t5" else 8, None)
    masks = {"attention_mask": x["attention_mask"]}, {}
    first, second = (model.generate(inputs_embeds=embeddings, **mask, **kwargs) for mask in masks)
    assert_same_tokens(first, lambda: model.generate(**x, **kwargs)[:, shown])
    assert torch.equal(second, first)


@pytest.mark.parametrize("setting", ["prefill_chunk_size", "prompt_lookup_num_tokens"])
def test_what_counts_input_ids_is_refused(setting):
    x = models.inputs(b=1, padding="none")
    with pytest.raises(ValueError, match=rf"cannot take \['{setting}'\]"):
        models.adapted("gpt2").generate(**x, max_new_tokens=2, **{setting: 4})
    model = models.adapted("t5")
    assert_same_tokens(
        model.generate(**x, max_new_tokens=4, **{setting: 4}), lambda: model.generate(**x, max_new_tokens=4)
    )


def test_sampling_takes_what_greedy_takes_at_top_1():
    model = models.adapted("llama")
    x = models.inputs(padding="none")
    kwargs = {"max_new_tokens": 5, "pad_token_id": 0}
    assert_same_tokens(model.generate(**x, **kwargs, do_sample=True, top_k=1), lambda: model.generate(**x, **kwargs))


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_a_failed_generation_leaves_nothing_behind(name):
    model = models.adapted(name)
    x = models.inputs()
    labels = models.targets(name, x)
    before = WithinRounding(lambda: model(**x, **labels).logits)
    with pytest.raises(ValueError):
        model.generate(**x, max_new_tokens=0 if name == "gpt2" else -1, num_beams=0)
    before.check(model(**x, **labels).logits)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_deep_copies_generate_alone(name):
    model = models.adapted(name)
    x = models.inputs(padding="none")
    kwargs = {"max_new_tokens": 4, "pad_token_id": 0}
    twin, expected = copy.deepcopy(model), model.generate(**x, **kwargs)
    assert_no_near_tie(lambda: model.generate(**x, **kwargs), expected)
    models.fill(model, "default", 9)
    assert torch.equal(twin.generate(**x, **kwargs), expected)
