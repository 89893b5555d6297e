"""A cache is read if everything is unchanged, and only then."""

import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from dect_models import TEMPLATE, TEXTS, WORDS, make, stopped_after, tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from peft_kernels.dect import extract


@pytest.fixture
def cached(tmp_path):
    model, t, _ = make("bert")
    path = tmp_path / "deeper" / "features.safetensors"
    return model, t, path, extract(model, t, TEXTS, TEMPLATE, WORDS, cache=path)


def runs(model, *arguments, **options):
    """Whether the model was called."""
    calls = []
    handle = model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    result = extract(model, *arguments, **options)
    handle.remove()
    return bool(calls), result


def features_and_scores(extraction):
    return extraction.features, extraction.scores


def test_is_read_again(cached):
    model, t, path, first = cached
    asked, again = runs(model, t, TEXTS, TEMPLATE, WORDS, cache=path, batch_size=2)
    assert not asked
    assert all(torch.equal(x, y) for x, y in zip(vars(first).values(), vars(again).values()))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "changed", ["weight", "one row of the table", "texts", "order", "template", "words", "max_length", "model"]
)
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
    other = type(t)(
        tokenizer_object=tokenizer("word").backend_tokenizer, mask_token="[SEP]", pad_token="[PAD]", model_max_length=40
    )
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


@pytest.mark.parametrize("content", [b"my thesis", b"{}", b"x" * 5000])
def test_a_file_of_something_else_stays(cached, tmp_path, content):
    model, t, *_ = cached
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cache must be a new file or one that extract has written, got .*mine"):
        runs(model, t, TEXTS, TEMPLATE, WORDS, cache=path)
    save_file({"weight": torch.zeros(3)}, other := tmp_path / "model.safetensors", metadata={"format": "pt"})
    for taken in (other, tmp_path):
        with pytest.raises(ValueError, match="cache must be a new file or one that extract has written"):
            extract(model, t, TEXTS, TEMPLATE, WORDS, cache=taken)
    assert path.read_bytes() == content and "weight" in load_file(other)
    (tmp_path / "empty").touch()
    assert runs(model, t, TEXTS, TEMPLATE, WORDS, cache=tmp_path / "empty")[0]


def test_any_flipped_bit_is_noticed(cached):
    model, t, path, first = cached
    good = path.read_bytes()
    for at in range(60, len(good), 97):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        again = extract(model, t, TEXTS, TEMPLATE, WORDS, cache=path)
        assert torch.equal(again.features, first.features) and torch.equal(again.scores, first.scores), at
    path.write_bytes(good[:-40])
    assert runs(model, t, TEXTS, TEMPLATE, WORDS, cache=path)[0]
    assert not runs(model, t, TEXTS, TEMPLATE, WORDS, cache=path)[0]


def test_a_path_that_cannot_be_written_is_noticed_first(cached, tmp_path):
    model, t, *_ = cached
    (tmp_path / "file").touch()
    calls = []
    model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="cache must be a path that can be written"):
        extract(model, t, TEXTS, TEMPLATE, WORDS, cache=tmp_path / "file" / "below")
    assert not calls


def interrupt():
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(tmp_path):
    model, t, _ = make("bert")
    path = tmp_path / "features"
    handle, whole = stopped_after(model, 99, interrupt)
    extract(model, t, TEXTS, TEMPLATE, WORDS, batch_size=1)
    handle.remove()
    handle, _ = stopped_after(model, len(whole) - 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(model, t, TEXTS, TEMPLATE, WORDS, batch_size=1, cache=path)
    handle.remove()
    handle, rest = stopped_after(model, 99, interrupt)
    got = extract(model, t, TEXTS, TEMPLATE, WORDS, batch_size=2, cache=path)
    handle.remove()
    assert len(rest) <= 3, "two rows in one batch, after the columns are tried"
    assert_within_rounding(
        features_and_scores(got), lambda: features_and_scores(extract(model, t, TEXTS, TEMPLATE, WORDS, batch_size=1))
    )
    assert not runs(model, t, TEXTS, TEMPLATE, WORDS, cache=path)[0]


def test_a_killed_run_goes_on(tmp_path):
    path = tmp_path / "features"
    model, t, _ = make("bert")
    t.save_pretrained(tmp_path / "tokenizer")  # training another would assign other ids in other processes
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
from dect_models import TEMPLATE, TEXTS, WORDS, make, stopped_after
from transformers import PreTrainedTokenizerFast
from peft_kernels.dect import extract, extraction
extraction.SAVE_SECONDS = extraction.SAVE_SHARE = 0
model, _, _ = make("bert")
t = PreTrainedTokenizerFast.from_pretrained({str(tmp_path / "tokenizer")!r})
stopped_after(model, 6, lambda: os.kill(os.getpid(), signal.SIGKILL))
extract(model, t, TEXTS, TEMPLATE, WORDS, batch_size=1, cache={str(path)!r})
"""
    killed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=os.getcwd(),
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    handle, rest = stopped_after(model, 99, interrupt)
    got = extract(model, t, TEXTS, TEMPLATE, WORDS, batch_size=1, cache=path)
    handle.remove()
    assert 0 < len(rest) < 6
    assert_within_rounding(
        features_and_scores(got), lambda: features_and_scores(extract(model, t, TEXTS, TEMPLATE, WORDS, batch_size=1))
    )


def test_adapters_have_features_of_their_own(tmp_path):
    model, t, _ = make("bert")
    path = tmp_path / "features"
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name="one")
    adapted.add_adapter("two", config)

    def asked():
        asked, got = runs(adapted.base_model.model, t, TEXTS, TEMPLATE, WORDS, cache=path)
        assert asked
        return got.features

    def expected():
        return WithinRounding(lambda: extract(adapted.base_model.model, t, TEXTS, TEMPLATE, WORDS).features)

    seen, states = [asked()], [expected()]
    adapted.set_adapter("two")
    seen, states = [*seen, asked()], [*states, expected()]
    with adapted.disable_adapter():
        seen, states = [*seen, asked()], [*states, expected()]
    for i, j in product(range(3), range(3)):
        if i == j:
            states[i].check(seen[j])
        else:
            with pytest.raises(AssertionError, match="error"):
                states[i].check(seen[j])
    adapted.merge_adapter()
    states[1].check(asked())


def test_a_random_pooler_is_no_reason_to_run_again(tmp_path):
    make("bert")[0].save_pretrained(tmp_path / "model")
    t = tokenizer("word")
    models = [AutoModel.from_pretrained(tmp_path / "model") for _ in range(2)]
    asked = [runs(m, t, TEXTS, TEMPLATE, None, cache=tmp_path / "features")[0] for m in models]
    assert asked == [True, False]
