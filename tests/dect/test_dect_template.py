"""Texts in a template, truncated or not, and the pieces of label words."""

import pytest
from dect_models import TEMPLATE, make, tokenizer

from peft_kernels.dect import extract
from peft_kernels.dect.template import Template
from peft_kernels.hf.frozen import max_length_of


def tokens(t, ids):
    return t.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram"])
@pytest.mark.parametrize("template", [TEMPLATE, "It was {mask}: {text} (all in all)"])
@pytest.mark.parametrize("words", [0, 3, 30, 31, 32, 200])
def test_cuts_the_text_and_nothing_else(kind, template, words):
    t = tokenizer(kind)
    filled = Template(template, t, 40)
    (got,) = filled.encode([" ".join(["film"] * words)])
    assert len(got.input_ids) <= 40
    assert got.input_ids[got.position] == filled.mask_id and got.input_ids.count(filled.mask_id) == 1
    kept = sum(1 for n in range(201) if len(t(filled.fill(" ".join(["film"] * n)))["input_ids"]) <= 40) - 1
    cut = " ".join(["film"] * min(words, kept))
    expected = t(filled.fill(cut))["input_ids"]
    assert (
        got.input_ids[-3:] == expected[-3:]
        and got.input_ids[:2] == expected[:2]
        and len(got.input_ids) >= len(expected)
    )


def test_a_template_that_does_not_fit():
    with pytest.raises(ValueError, match="more than max_length=5 tokens: the mask would be truncated away"):
        Template(TEMPLATE, tokenizer("word"), 5).encode(["a fine film"])


@pytest.mark.parametrize(("template", "last"), [("{text} It was {mask}.", True), ("{mask}: {text}", False)])
def test_a_mask_in_the_text(template, last):
    t = tokenizer("word")
    (got,) = Template(template, t, 40).encode(["a [MASK] film [MASK]"])
    found = [i for i, x in enumerate(got.input_ids) if x == t.mask_token_id]
    assert len(found) == 3 and got.position == (found[-1] if last else found[0])


def test_placeholders_in_the_text_are_text():
    t = tokenizer("word")
    (got,) = Template(TEMPLATE, t, 40).encode(["a {mask} {text}"])
    assert got.input_ids.count(t.mask_token_id) == 1


def test_a_causal_template_ends_before_the_word():
    t = tokenizer("gpt")
    (got,) = Template("{text} It was {mask}", t, 40, causal=True).encode(["bad"])
    assert t.decode(got.input_ids) == "bad It was" and got.position == len(got.input_ids) - 1


@pytest.mark.parametrize(
    ("kind", "template", "word", "piece"),
    [
        ("word", "{text} It was {mask}.", "great", "great"),
        ("word", "{text} ({mask})", "great", "great"),
        ("bpe", "{text} It was {mask}.", "great", "Ġgreat"),
        ("bpe", "{text} ({mask})", "great", "great"),
        ("bpe", "{text} ({mask})", " great", "Ġgreat"),
        ("bpe", "{mask}: {text}", "great", "great"),
        ("gpt", "{text} It was {mask}", "terrible", "Ġterrible"),
        ("unigram", "{text} It was {mask}.", "great", "▁great"),
        ("unigram", "{mask}: {text}", "great", "▁great"),
    ],
)
def test_label_words_are_read_as_they_stand_at_the_mask(kind, template, word, piece):
    t = tokenizer(kind)
    ((i,),) = Template(template, t, 40, causal=kind == "gpt").label_ids([word])
    assert tokens(t, [i]) == [piece]


def test_label_words():
    t = tokenizer("word")
    filled = Template(TEMPLATE, t, 40)
    great, good, bad = t.convert_tokens_to_ids(["great", "good", "bad"])
    assert filled.label_ids([["great", "good"], "bad"]) == [[great, good], [bad, -1]]
    assert filled.label_ids([["great", "great"], ["bad"]]) == [[great], [bad]]
    first = t("goodest", add_special_tokens=False)["input_ids"]
    assert len(first) > 1 and filled.label_ids([["goodest"]]) == [[first[0]]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "label_words must have at least one class, got none"),
        ([["great"], []], "label_words must have a word for every class, got none for class 1"),
        ([["great"], [""]], "the label word '' has no piece"),
        ([["great"], [" "]], "the label word ' ' has no piece"),
        ([["great"], ["日本"]], "the label word '日本' has no piece"),
        ([["great"], ["great"]], "the first pieces of the words of class 1"),
    ],
)
def test_errors_of_label_words(words, message):
    with pytest.raises(ValueError, match=message):
        Template(TEMPLATE, tokenizer("word"), 40).label_ids(words)


@pytest.mark.parametrize(
    ("template", "kind", "causal", "message"),
    [
        ("It was {mask}.", "word", False, r"template must contain \{text\} once"),
        ("{text} It was great.", "word", False, r"template must contain \{mask\} once"),
        ("{text} {mask} {mask}", "word", False, r"template must contain \{mask\} once"),
        ("{text} It was {mask}.", "gpt", True, r"must end with \{mask\}"),
        ("{text} It was {mask}.", "gpt", False, "has neither a mask token nor <extra_id_0>"),
    ],
)
def test_errors_of_templates(template, kind, causal, message):
    with pytest.raises(ValueError, match=message):
        Template(template, tokenizer(kind), 40, causal=causal)


def test_errors_of_extract():
    model, t, template = make("bert")
    with pytest.raises(TypeError, match="texts must be a sequence of strings, got"):
        extract(model, t, ["a", 3], template, ["great", "bad"])
    with pytest.raises(TypeError, match="texts must be a sequence of strings, got"):
        extract(model, t, "a film", template, ["great", "bad"])
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel"):
        extract(object(), t, ["a"], template, ["great", "bad"])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        extract(model, t, ["a"], template, ["great", "bad"], batch_size=0)
    with pytest.raises(ValueError, match="has no <extra_id_0>"):
        extract(make("t5")[0], t, ["a"], template, ["great", "bad"])


def test_max_length():
    t = tokenizer("bpe")
    assert max_length_of(make("roberta")[0], t, 512) == 40
    wide = t.model_max_length
    try:
        t.model_max_length = 10**30
        assert max_length_of(make("roberta")[0], t, 512) == 64 - (t.pad_token_id + 1)
        assert max_length_of(make("bert")[0], t, 512) == 64
        assert max_length_of(make("t5")[0], t, 512) == 512
    finally:
        t.model_max_length = wide
