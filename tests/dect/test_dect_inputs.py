"""Texts, words and labels in the forms that users have: each is interpreted correctly or refused in one sentence."""

import numpy as np
import pytest
import torch
from accuracy import WithinRounding
from dect_models import TEXTS, WORDS, make
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from test_dect_model import LABELS, logits_of, trained

from peft_kernels.dect import DecoderTuning, DecTForSequenceClassification, extract
from peft_kernels.hf.frozen import strings


@pytest.fixture(scope="module")
def bert():
    return make("bert")


class Table:
    """Mimics a pandas table: two dimensions, and an iterator over the column names."""

    ndim = 2

    def __iter__(self):
        return iter(["text", "label"])


@pytest.mark.parametrize(
    "form",
    [list, tuple, iter, lambda x: map(str, x), lambda x: (y for y in x), np.array, lambda x: np.array(x, object)],
)
def test_texts_of_every_form(bert, form):
    model, t, template = bert
    expected = extract(model, t, TEXTS[:3], template, None)
    assert torch.equal(extract(model, t, form(TEXTS[:3]), template, None).features, expected.features)
    words = [form(words) for words in WORDS]
    assert torch.equal(
        extract(model, t, [], template, iter(words)).empty_scores, extract(model, t, [], template, WORDS).empty_scores
    )


@pytest.mark.parametrize(
    ("texts", "got"),
    [
        ("abc", "one string"),
        (b"abc", "bytes"),
        ({"a": 1, "b": 2}, "dict"),
        ({"a", "b"}, "set"),
        (Table(), "Table"),
        (np.array([["a", "b"]]), "ndarray"),
        (None, "NoneType"),
        (3, "int"),
        ([("a", "b"), ("c", "d")], "tuple at 0"),
        (["a", None], "NoneType at 1"),
        (["a", b"b"], "bytes at 1"),
        ([["a"]], "list at 0"),
    ],
)
def test_texts_that_are_none(bert, texts, got):
    model, t, template = bert
    with pytest.raises(TypeError, match=f"DecT: texts must be a sequence of strings, got {got}"):
        extract(model, t, texts, template, None)


def test_pairs():
    pairs = [("a", "b"), ("c", "d")]
    for form in (pairs, iter(pairs), [list(x) for x in pairs], np.array(pairs)):
        assert strings("m", "texts", form, pairs=True) == pairs
    for wrong in (
        ["a", ("b", "c")],
        [("a", "b"), "cd"],
        [("a", "b", "c")],
        [("a", 1)],
        [("a", "b"), ("c",)],
        "ab",
        {"a": "b"},
        [{"a", "b"}],
    ):
        with pytest.raises(TypeError, match="m: texts must be a sequence of strings or of pairs of strings, got"):
            strings("m", "texts", wrong, pairs=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"negative": ["terrible"], "positive": ["great"]}, r"got a mapping: give list\(label_words.values\(\)\)"),
        ("great", "label_words must be a sequence with the words of each class in order, got one string"),
        ({"great", "terrible"}, "in order, got set"),
        (3, "in order, got int"),
        ([["great"], [3]], r"label_words\[1\] must be a sequence of strings, got int at 0"),
        ([["great"], 3], r"label_words\[1\] must be a sequence of strings, got int"),
        ([["great"], {"terrible": 1}], r"label_words\[1\] must be a sequence of strings, got dict"),
    ],
)
def test_words_that_are_none(bert, words, message):
    model, t, template = bert
    with pytest.raises(TypeError, match=message):
        extract(model, t, TEXTS, template, words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"max_length": 0}, "max_length must be at"),
    ],
)
def test_numbers(bert, options, message):
    model, t, template = bert
    with pytest.raises(ValueError, match=message):
        extract(model, t, TEXTS, template, None, **options)
    with pytest.raises(TypeError, match="template must be a string"):
        extract(model, t, TEXTS, [template], None)


def test_features_of_the_active_adapter(bert):
    _, t, template = bert
    model = make("bert")[0]

    def features(model):
        return extract(model, t, TEXTS, template, WORDS).features

    plain = WithinRounding(lambda: features(model))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    got = WithinRounding(lambda: features(adapted))
    with pytest.raises(AssertionError, match="error"):
        plain.check(features(adapted))
    with adapted.disable_adapter():
        plain.check(features(adapted))
    got.check(features(adapted.merge_and_unload()))


def test_adapters_that_move_the_mask():
    model, t, template = make("gpt2")
    adapted = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    with pytest.raises(ValueError, match="adapter 'default' is PROMPT_TUNING, which works in PEFT's wrapper"):
        extract(adapted, t, TEXTS, template, WORDS)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_padding_on_either_side(name):
    model, t, q = trained(name)
    expected = WithinRounding(lambda: logits_of(model, t))
    expected.check(q)
    rows = t(model.prepare(TEXTS, t))["input_ids"]
    longest = max(map(len, rows))
    for left in (True, False):
        fill = [[0] * (longest - len(row)) for row in rows]
        ids = torch.tensor([f + row if left else row + f for f, row in zip(fill, rows)])
        mask = torch.tensor(
            [[0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f) for f, row in zip(fill, rows)]
        )
        expected.check(model(ids, mask).logits)
    mask[2] = 0
    with pytest.raises(ValueError, match="row 2 is all padding"):
        model(ids, mask)


def test_labels_and_modes_of_the_model():
    model, t, _ = trained("bert")
    expected = WithinRounding(lambda: logits_of(model, t))
    batch = t(model.prepare(TEXTS, t), padding=True, return_tensors="pt")
    for labels, message in (
        (
            torch.rand(6),
            "labels must be integers, the class indices, got torch.float32; regression is not supported",
        ),
        (
            torch.eye(2)[torch.tensor(LABELS)].long(),
            r"labels must be \(6,\), one class index for each row, got \(6, 2\)",
        ),
        (torch.tensor([0, 1, 2, 0, 1, 0]), r"labels must lie in \[0, 2\), got values from 0 to 2"),
        (torch.tensor([0, 1, -100, 0, 1, 0]), r"labels must lie in \[0, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch, labels=labels)
    with pytest.raises(ValueError, match="is trained by DecoderTuning.fit"):
        model.train()(**batch, labels=torch.tensor(LABELS))
    expected.check(model(**batch).logits)  # also no dropout
    assert torch.equal(model(**batch, return_dict=False)[0], model(**batch).logits)


def test_backbones_that_could_not_be_loaded_again(bert):
    model, t, template = bert
    found = extract(model, t, TEXTS, template, None)
    classifier = DecoderTuning(dim=4).fit(found.features, LABELS)
    adapted = get_peft_model(make("bert")[0], LoraConfig(r=2, target_modules=["query"]))

    class Mine(type(model)):
        pass

    for backbone, message in (
        (adapted, "without adapters"),
        (Mine(model.config), "of a class of transformers, got Mine"),
    ):
        with pytest.raises(ValueError, match=message):
            DecTForSequenceClassification.from_classifier(classifier, backbone, t, template, None)
    with pytest.raises(ValueError, match="must be those of the classifier's 2 classes, got 1"):
        of_scores = DecoderTuning(dim=4, calibration="none").fit(found.features, LABELS, torch.rand(6, 2))
        DecTForSequenceClassification.from_classifier(of_scores, model, t, template, ["great"])
