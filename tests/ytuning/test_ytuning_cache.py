"""The cache of features: its content, and the handling of interrupted, damaged and stale caches."""

import json
import pickle

import pytest
import torch
import ytuning_tiny as tiny
from accuracy import assert_within_rounding

from peft_kernels.ytuning import CachedFeatures, FeatureCollator, cache, cache_features


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_TOKENS", 40)


@pytest.fixture
def given(tmp_path):
    """model, tokenizer, texts, folder"""
    return tiny.backbone(), tiny.tokenizer(tmp_path), tiny.texts()[0], tmp_path / "cache"


def _alone(model, tokenizer, text, layer=-1):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][0]


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


class Counted:
    """A model that counts its batches, and may fail before one of them."""

    def __init__(self, model, fails_at=None):
        self.model, self.fails_at, self.batches = model, fails_at, 0

    def __enter__(self):
        self.handle = self.model.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def _count(self, *_):
        if self.batches == self.fails_at:
            raise KeyboardInterrupt
        self.batches += 1


def _counted(model, *arguments, fails_at=None, **options):
    with Counted(model, fails_at) as counted:
        cache_features(model, *arguments, **options)
    return counted.batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [-1, 1])
def test_every_text_in_its_place(given, dtype, layer):
    model, tokenizer, texts, folder = given
    cache_features(model, tokenizer, texts, folder, batch_size=3, dtype=dtype, layer=layer)
    data = CachedFeatures(folder, verify=True)
    assert len(data) == len(texts) and len(data.names) > 3
    for item, text, length in zip((data[i] for i in range(len(data))), texts, data.lengths):
        assert item["features"].dtype == dtype and len(item["features"]) == length
        assert_within_rounding(item["features"], lambda: _alone(model, tokenizer, text, layer).to(dtype))


def test_pairs_of_texts(given):
    model, tokenizer, texts, folder = given
    pairs = list(zip(texts[:6], texts[6:12]))
    cache_features(model, tokenizer, pairs, folder, dtype=torch.float32)
    pair = tokenizer(*pairs[4], return_tensors="pt")
    assert_within_rounding(CachedFeatures(folder)[4]["features"], lambda: model(**pair).last_hidden_state[0])


def test_no_text(given):
    model, tokenizer, _, folder = given
    assert len(CachedFeatures(cache_features(model, tokenizer, [], folder))) == 0


@pytest.mark.parametrize("fails_at", [0, 1, 4, 7])
def test_an_interrupted_run_continues(given, fails_at):
    model, tokenizer, texts, folder = given
    whole = _counted(model, tokenizer, texts, folder.with_name("whole"), batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        _counted(model, tokenizer, texts, folder, batch_size=3, fails_at=fails_at)
    before = _contents(folder)
    if before:
        with pytest.raises(ValueError, match="run cache_features again to continue"):
            CachedFeatures(folder)
    rest = _counted(model, tokenizer, texts, folder, batch_size=3)
    assert whole - fails_at <= rest < whole - fails_at + 6, "at most a shard is lost"
    assert _contents(folder) == _contents(folder.with_name("whole"))
    assert all(_contents(folder)[name] == content for name, content in before.items())
    assert _counted(model, tokenizer, texts, folder, batch_size=3) == 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "not entered"])
def test_a_damaged_shard_is_found_and_rebuilt(given, damage):
    model, tokenizer, texts, folder = given
    cache_features(model, tokenizer, texts, folder)
    good, name = _contents(folder), sorted(_contents(folder))[2]
    path = folder / name
    if damage == "flipped":
        path.write_bytes(good[name][:-1] + bytes([good[name][-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(good[name][:-5])
    elif damage == "gone":
        path.unlink()
    else:
        index = json.loads((folder / cache.INDEX).read_text())
        del index["done"][name]
        (folder / cache.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="run cache_features again"):
        CachedFeatures(folder, verify=True)
    assert _counted(model, tokenizer, texts, folder) == 1 and _contents(folder) == good
    CachedFeatures(folder, verify=True)


def test_a_damaged_index_loses_nothing_but_time(given):
    model, tokenizer, texts, folder = given
    cache_features(model, tokenizer, texts, folder)
    good = _contents(folder)
    (folder / cache.INDEX).write_text("{")
    with pytest.raises(ValueError, match="has no index of features"):
        CachedFeatures(folder)
    cache_features(model, tokenizer, texts, folder)
    assert _contents(folder) == good


def test_a_stale_cache_is_refused_or_rebuilt(given, tmp_path):
    model, tokenizer, texts, folder = given
    cache_features(model, tokenizer, texts, folder)
    good = _contents(folder)
    changed = {
        "model": {"model": tiny.backbone(1)},
        "texts": {"texts": [*texts[:-1], texts[0]]},
        "fewer": {"texts": texts[:-1]},
        "dtype": {"dtype": torch.float32},
        "layer": {"layer": 1},
        "max_length": {"max_length": 4},
    }
    for options in changed.values():
        arguments = {"model": model, "tokenizer": tokenizer, "texts": texts, **options}
        with pytest.raises(ValueError, match="another model, tokenizer or texts"):
            cache_features(folder=folder, **arguments)
        assert _contents(folder) == good
    cache_features(tiny.backbone(1), tokenizer, texts[:5], folder, overwrite=True)
    assert len(CachedFeatures(folder, verify=True)) == 5 and _contents(folder) != good


def test_the_model_keeps_its_mode(given):
    model, tokenizer, texts, folder = given
    cache_features(model.train(), tokenizer, texts[:4], folder, dtype=torch.float32)
    assert model.training
    assert_within_rounding(CachedFeatures(folder)[0]["features"], lambda: _alone(model.eval(), tokenizer, texts[0]))


def test_labels_workers_and_batches(given):
    model, tokenizer, texts, folder = given
    labels = tiny.texts()[1]
    cache_features(model, tokenizer, texts, folder)
    data = CachedFeatures(folder, labels)
    data = pickle.loads(pickle.dumps(data)) if data[0] else None
    loader = torch.utils.data.DataLoader(data, batch_size=5, collate_fn=FeatureCollator(), num_workers=1)
    batch = next(iter(loader))
    assert batch["labels"].tolist() == labels[:5] and batch["lengths"].tolist() == data.lengths[:5]
    assert batch["features"].shape == (5, max(data.lengths[:5]), tiny.WIDTH)
    assert torch.equal(batch["features"][3, : data.lengths[3]], data[3]["features"])
    assert "labels" not in FeatureCollator()([CachedFeatures(folder)[0]])


def test_errors(given):
    model, tokenizer, texts, folder = given
    with pytest.raises(ValueError, match="dtype must be torch.bfloat16 or torch.float32, got torch.float16"):
        cache_features(model, tokenizer, texts, folder, dtype=torch.float16)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        cache_features(model, tokenizer, texts, folder, batch_size=0)
    with pytest.raises(ValueError, match="has no index of features"):
        CachedFeatures(folder)
    cache_features(model, tokenizer, texts, folder)
    with pytest.raises(ValueError, match="labels must be one for each of 24 texts, got 3"):
        CachedFeatures(folder, [0, 1, 2])
