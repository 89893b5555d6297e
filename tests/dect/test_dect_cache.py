"""A cache is read where everything is as it was, and nowhere else."""

import pytest
import torch
from dect_models import TEMPLATE, TEXTS, WORDS, make, tokenizer

from peft_kernels.dect import extract


@pytest.fixture
def cached(tmp_path):
    model, t, _ = make("bert")
    path = tmp_path / "deeper" / "features.safetensors"
    return model, t, path, extract(model, t, TEXTS, TEMPLATE, WORDS, cache=path)


def runs(model, *arguments, **options):
    """Whether the model was asked."""
    calls = []
    handle = model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    result = extract(model, *arguments, **options)
    handle.remove()
    return bool(calls), result


def test_is_read_again(cached):
    model, t, path, first = cached
    asked, again = runs(model, t, TEXTS, TEMPLATE, WORDS, cache=path, batch_size=2)
    assert not asked
    assert all(torch.equal(x, y) for x, y in zip(vars(first).values(), vars(again).values()))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("changed", ["weight", "one row of the table", "texts", "order", "template", "words", "max_length", "model"])
def test_is_not_read_where_anything_has_changed(cached, changed):
    model, t, path, _ = cached
    texts, template, words, options = list(TEXTS), TEMPLATE, WORDS, {}
    with torch.no_grad():
        if changed == "weight":
            model.bert.encoder.layer[1].output.dense.weight.mul_(1.01)
        elif changed == "one row of the table":
            model.bert.embeddings.LayerNorm.bias[3] += 1
        elif changed == "texts":
            texts[0] += " film"
        elif changed == "order":
            texts.reverse()
        elif changed == "template":
            template = TEMPLATE.replace("It", "it")
        elif changed == "words":
            words = [["good", "terrible"], ["great"]]
        elif changed == "max_length":
            options["max_length"] = 12
        else:
            model.config.hidden_act = "relu"
    asked, got = runs(model, t, texts, template, words, cache=path, **options)
    assert asked
    asked, again = runs(model, t, texts, template, words, cache=path, **options)
    assert not asked and torch.equal(got.scores, again.scores)


def test_another_tokenizer(cached):
    model, t, path, _ = cached
    other = type(t)(tokenizer_object=tokenizer("word").backend_tokenizer, mask_token="[SEP]", pad_token="[PAD]", model_max_length=40)
    assert runs(model, other, TEXTS, "{text} {mask}", None, cache=path)[0]


def test_a_broken_file_is_made_again(cached):
    model, t, path, first = cached
    path.write_bytes(path.read_bytes()[:50])
    asked, again = runs(model, t, TEXTS, TEMPLATE, WORDS, cache=path)
    assert asked and torch.equal(again.features, first.features)


def test_without_scores(cached, tmp_path):
    model, t, *_ = cached
    extract(model, t, TEXTS, TEMPLATE, None, cache=tmp_path / "features")
    calls = []
    model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert extract(model, t, TEXTS, TEMPLATE, None, cache=tmp_path / "features").scores is None and not calls
