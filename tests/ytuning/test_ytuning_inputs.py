"""Models, texts and labels in the forms that users have; caches that are shared, damaged, or no caches at all."""

import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import ytuning_tiny as tiny
from accuracy import WithinRounding, assert_within_rounding
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_kernels.ytuning import CachedFeatures, YTuningConfig, cache, cache_features


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_TOKENS", 40)


@pytest.fixture
def given(tmp_path):
    return tiny.backbone(), tiny.tokenizer(tmp_path), tiny.texts()[0], tmp_path / "cache"


def features(*arguments, **options):
    data = CachedFeatures(cache_features(*arguments, dtype=torch.float32, **options))
    return [data[i]["features"] for i in range(len(data))]


def in_one_batch(model, tokenizer, texts):
    """The stock model's features of every text, without padding."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    return [x[mask.bool()] for x, mask in zip(states, batch["attention_mask"])]


@pytest.mark.parametrize("form", [iter, tuple, lambda x: map(str, x), np.array])
def test_texts_of_every_form(given, form):
    model, tokenizer, texts, folder = given
    assert_within_rounding(
        features(model, tokenizer, form(texts), folder), lambda: in_one_batch(model, tokenizer, texts)
    )


@pytest.mark.parametrize(
    "texts", ["abc", b"abc", {"a": "b"}, ["a", ("b", "c")], [("a", "b"), "cd"], [("a", "b", "c")], [3], None]
)
def test_texts_that_are_none(given, texts):
    model, tokenizer, _, folder = given
    with pytest.raises(
        TypeError, match="cache_features: texts must be a sequence of strings or of pairs of strings, got"
    ):
        cache_features(model, tokenizer, texts, folder)
    assert not folder.exists()


def test_a_model_with_a_head_and_one_with_adapters(given):
    model, tokenizer, texts, folder = given
    cache_features(model, tokenizer, texts, folder, dtype=torch.float32)
    expected = WithinRounding(lambda: in_one_batch(model, tokenizer, texts))
    for number, kind in enumerate((BertForMaskedLM, BertForSequenceClassification)):
        headed = kind(model.config)
        headed.base_model.load_state_dict(model.state_dict(), strict=False)
        expected.check(features(headed, tokenizer, texts, folder.with_name(f"head{number}")))
    adapted = get_peft_model(headed, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    got = features(adapted, tokenizer, texts, folder.with_name("adapted"))
    with pytest.raises(AssertionError, match="error"):
        expected.check(got)
    with adapted.disable_adapter():
        with pytest.raises(ValueError, match="holds features of another model"):
            cache_features(adapted, tokenizer, texts, folder.with_name("adapted"), dtype=torch.float32)
        expected.check(features(adapted, tokenizer, texts, folder.with_name("off")))
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        cache_features(torch.nn.Linear(2, 2), tokenizer, texts, folder)


def test_the_encoder_of_an_encoder_decoder(given):
    _, tokenizer, texts, folder = given
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=45, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ).eval()
    got = features(model, tokenizer, texts, folder)
    row = tokenizer(texts[2], return_tensors="pt", return_token_type_ids=False)
    assert_within_rounding(got[2], lambda: model.get_encoder()(**row).last_hidden_state[0])


def test_a_checkpoint_without_a_pooler_resumes(given, tmp_path):
    model, tokenizer, texts, folder = given
    BertForMaskedLM(model.config).save_pretrained(tmp_path / "model")
    first, second = (AutoModel.from_pretrained(tmp_path / "model") for _ in range(2))
    cache_features(first, tokenizer, texts, folder)
    calls = []
    second.register_forward_pre_hook(lambda *_: calls.append(1))
    cache_features(second, tokenizer, texts, folder)
    assert not calls


def test_empty_texts_and_tokenizers_without_padding(given):
    _, words, texts, folder = given
    backend = words.backend_tokenizer
    backend.post_processor = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", model_max_length=10**30)
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=45, n_embd=32, n_layer=1, n_head=4, n_positions=8)).eval()
    got = features(model, tokenizer, ["", "w1 w2 w3", *texts[:6], ""], folder, batch_size=3)
    assert [len(x) for x in got[:2]] == [0, 3] and max(map(len, got)) == 8 and len(got[-1]) == 0
    row = tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)
    assert_within_rounding(got[1], lambda: model(**row).last_hidden_state[0])


def test_a_backbone_reads_padding_on_either_side():
    model = tiny.model(hidden_size=32)
    torch.manual_seed(0)
    model.set_backbone(GPT2Model(GPT2Config(vocab_size=45, n_embd=32, n_layer=1, n_head=4, n_positions=16)))
    ids = torch.randint(5, 45, (3, 9))
    mask = (torch.arange(9) < torch.tensor([5, 9, 2])[:, None]).long()
    left = torch.stack([row.roll(int(9 - m.sum())) for row, m in zip(ids * mask, mask)])
    got = model(input_ids=left, attention_mask=mask.flip(1)).logits
    assert_within_rounding(got, lambda: model(input_ids=ids * mask, attention_mask=mask).logits)


def test_threads_share_a_backbone(tmp_path):
    """All threads give the result of one thread, up to rounding: libraries may split a sum among as many threads as are
    free.
    """
    tiny.backbone().save_pretrained(tmp_path / "backbone")
    model = tiny.model(backbone=str(tmp_path / "backbone"))
    batches = [torch.randint(5, 45, (1, n), generator=torch.Generator().manual_seed(n)) for n in range(3, 11)]
    twin, wrong = tiny.model(backbone=str(tmp_path / "backbone")), []
    with torch.no_grad():
        expected = [WithinRounding(lambda ids=ids: twin(input_ids=ids).logits) for ids in batches]

    def serve(number):
        for step in range(125):
            i = (number + step) % 8
            with torch.no_grad():
                got = model(input_ids=batches[i]).logits
            try:
                expected[i].check(got)
            except AssertionError as error:
                wrong.append((number, step, error))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_labels_of_every_form(given):
    model, tokenizer, texts, folder = given
    cache_features(model, tokenizer, texts, folder)
    labels = tiny.texts()[1]
    for form in (iter(labels), np.array(labels), np.array(labels, np.float64), torch.tensor(labels), tuple(labels)):
        assert [item["labels"] for item in CachedFeatures(folder, form)] == labels
    for wrong, message in (
        ([0.5] * 24, "got 0.5: a regression has no classes"),
        (np.full(24, np.nan), "got nan"),
        (["0"] * 24, "got str32 such as '0'"),
        (np.eye(2)[labels], r"got an array of shape \(24, 2\)"),
        ([True] * 24, "got bool such as True"),
    ):
        with pytest.raises(
            ValueError, match=f"CachedFeatures: labels must be one class index for each text, {message}"
        ):
            CachedFeatures(folder, wrong)


def test_losses_that_are_none():
    with pytest.raises(ValueError, match="problem_type must be one of .* got 'regression': a text has one label"):
        YTuningConfig(hidden_size=32, num_attention_heads=4, problem_type="regression")
    x, lengths = torch.randn(2, 3, 32), torch.tensor([3, 2])
    for options, labels, message in (
        ({"num_labels": 1}, torch.tensor([0, 0]), "a loss needs num_labels of at least 2"),
        ({}, torch.tensor([0.0, 1.0]), "labels must be integers, the class indices, got torch.float32"),
        ({}, torch.tensor([[0, 1], [1, 0]]), r"labels must be \(2,\)"),
        ({"loss": "cross_entropy"}, torch.tensor([0, -100]), r"labels must lie in \[0, 3\), got values from -100 to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.model(**options)(features=x, lengths=lengths, labels=labels)


def test_two_processes_write_one_cache(given, tmp_path):
    model, tokenizer, texts, folder = given
    model.save_pretrained(tmp_path / "model")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import ytuning_tiny as tiny
from transformers import BertModel
from peft_kernels.ytuning import cache
cache.SHARD_TOKENS = 40
model = BertModel.from_pretrained({str(tmp_path / "model")!r})
cache.cache_features(model, tiny.tokenizer(Path({str(tmp_path)!r})), tiny.texts(80)[0], {str(folder)!r}, batch_size=1)
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert len(CachedFeatures(folder, verify=True)) == 80
    assert not list(folder.glob("*.part"))


def test_a_flipped_bit_is_noticed_where_it_is_read(given):
    model, tokenizer, texts, folder = given
    cache_features(model, tokenizer, texts, folder)
    path = sorted(folder.glob("*.safetensors"))[2]
    content = path.read_bytes()
    begin = (
        8
        + int.from_bytes(content[:8], "little")
        + json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["features"]["data_offsets"][0]
    )
    path.write_bytes(content[:begin] + bytes([content[begin] ^ 16]) + content[begin + 1 :])
    data = pickle.loads(pickle.dumps(CachedFeatures(folder)))
    with pytest.raises(ValueError, match=f"{path.name} is damaged: run cache_features again"):
        [data[i] for i in range(len(data))]


def test_folders_of_something_else_stay(given, tmp_path):
    model, tokenizer, texts, folder = given
    folder.mkdir()
    (folder / "index.json").write_text('{"my": "index"}')
    with pytest.raises(
        ValueError,
        match="folder must be new or written by cache_features, got .*cache, whose index.json is something else",
    ):
        cache_features(model, tokenizer, texts, folder, overwrite=True)
    assert json.loads((folder / "index.json").read_text()) == {"my": "index"}
    (tmp_path / "file").touch()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="folder must be a path that can be written"):
        cache_features(model, tokenizer, texts, tmp_path / "file")
    assert not calls


def test_a_layer_that_is_none(given):
    model, tokenizer, texts, folder = given
    with pytest.raises(ValueError, match=r"layer must lie in \[-3, 2\], got 3"):
        cache_features(model, tokenizer, texts, folder, layer=3)


def test_autocast():
    x, lengths, labels = torch.randn(4, 7, 32), torch.tensor([7, 2, 1, 5]), torch.tensor([0, 1, 2, 0])
    model = tiny.model(num_blocks=2)
    expected = WithinRounding(lambda: model(features=x, lengths=lengths).logits, dtype=torch.bfloat16)
    for features in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(features=features, lengths=lengths, labels=labels)
        output.loss.backward()
        expected.check(output.logits)
