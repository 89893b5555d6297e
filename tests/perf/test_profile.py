"""``peft-kernels profile`` on tiny models: it runs, writes what it reports, and finds disagreements; no measured number
is checked.
"""

import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from peft_kernels import dect
from peft_kernels.cli.commands import app
from peft_kernels.perf import pid_baselines, results
from peft_kernels.perf.profile import dept, models, plot
from peft_kernels.perf.profile.operator_times import NAMESPACE

T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 16}
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
SIZES = {"pid": {"batch": 2, "streams": 3, "length": 9, "new_tokens": 3}}
OTHER_SIZES = {"batch": 2, "length": 11}


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: tiny matmuls are slow on threads that other test processes hold up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoint(tmp_path):
    """Make a folder with a tiny model, and a tokenizer if it is an encoder."""

    def make(kind):
        torch.manual_seed(0)
        built = {
            "t5": lambda: pid_baselines.t5_base(**T5),
            "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=256)),
            "albert": lambda: AlbertForMaskedLM(AlbertConfig(**SMALL, embedding_size=16, max_position_embeddings=256)),
            "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
        }
        folder = tmp_path / kind
        built[kind]().save_pretrained(folder)
        if kind == "bert":
            words = [
                "[PAD]",
                "[UNK]",
                "[CLS]",
                "[SEP]",
                "[MASK]",
                "It",
                "was",
                ".",
                "terrible",
                "great",
                "A",
                "nurse",
                "finishes",
                "her",
            ]
            tokenizer = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            tokenizer.post_processor = processors.TemplateProcessing(
                "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
            )
            names = {
                "pad_token": "[PAD]",
                "unk_token": "[UNK]",
                "cls_token": "[CLS]",
                "sep_token": "[SEP]",
                "mask_token": "[MASK]",
            }
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
        return folder

    return make


def profile(out, *args, code=0):
    result = CliRunner().invoke(
        app, ["profile", *map(str, args), "--repeats", "2", "--out", str(out)], catch_exceptions=False
    )
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def sizes(method):
    return [
        part for axis, size in SIZES.get(method, OTHER_SIZES).items() for part in (f"--{axis.replace('_', '-')}", size)
    ]


def operators_in(trace):
    return {
        event["name"]
        for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        if event["name"].startswith(NAMESPACE)
    }


@pytest.mark.parametrize(
    "kind, method, train, candidates",
    [
        ("t5", "pid", False, ["stock", "ours", "ours, not packed"]),
        ("t5", "pid", True, ["stock", "ours"]),
        ("t5", "dept", True, ["stock", "prompt tuning", "ours"]),
        ("gpt2", "dept", True, ["stock", "prompt tuning", "ours"]),
        ("bert", "dept", False, ["stock", "prompt tuning", "ours"]),
        ("bert", "pasta", False, ["stock", "ours", "ours, fused"]),
        ("bert", "pasta", True, ["stock", "ours", "ours, fused"]),
        ("bert", "dect", False, ["stock", "ours"]),
        ("bert", "ytuning", False, ["stock", "ours"]),
        ("bert", "ytuning", True, ["stock", "ours", "ours, not cached"]),
    ],
)
def test_method(kind, method, train, candidates, checkpoint, tmp_path):
    text = profile(
        tmp_path / "out", checkpoint(kind), "--method", method, *sizes(method), *(["--train"] if train else [])
    )
    assert "stock and ours agree" in text and "RANDOM" not in text
    stem = f"profile_{method}{'_train' if train else ''}"
    written = results.read(tmp_path / "out" / f"{stem}.json")
    phases = ["training step"] if train else ["generate", "first token"] if method == "pid" else ["forward"]
    assert [(row.phase, row.candidate) for row in written.rows] == [
        (phase, candidate) for phase in phases for candidate in candidates
    ]
    for row in written.rows:
        assert row.benchmark == f"profile {method}" and row.variant == kind and row.dtype == "float32"
        assert row.runs == 2 and row.median_s > 0 and row.ratio > 0
    assert all(row.ratio == 1 for row in written.rows if row.candidate == "ours")
    assert written.rows[0].shape == SIZES.get(method, OTHER_SIZES)
    expected = (
        {"generate": (18, "tokens"), "first token": (6, "tokens"), "training step": (6, "streams")}
        if method == "pid"
        else {}
    )
    assert {(row.items, row.item) for row in written.rows} == {expected.get(phase, (2, "samples")) for phase in phases}
    assert not operators_in(tmp_path / "out" / f"{stem}_stock.trace.json.gz")
    # T5 trains with attention dropout, which our operators do not support
    assert bool(operators_in(tmp_path / "out" / f"{stem}_ours.trace.json.gz")) == ((method, train) != ("pid", True))


@pytest.mark.parametrize(
    "kind, config",
    [("t5", lambda: models.T5Config(**T5, decoder_start_token_id=0)), ("gpt2", lambda: GPT2Config(**GPT2))],
)
def test_architecture_has_random_weights_and_needs_no_tokenizer(kind, config, tmp_path, monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "tiny", config())
    text = profile(tmp_path / "out", "tiny", "--method", "dect", *sizes("dect"))
    assert "RANDOM weights" in text and "stock and ours agree" in text
    assert {row.variant for row in results.read(tmp_path / "out" / "profile_dect.json").rows} == {
        "tiny, random weights"
    }


def test_a_folder_comes_before_an_architecture_of_its_name(checkpoint, monkeypatch):
    folder = checkpoint("bert")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setitem(models.ARCHITECTURES, "bert", GPT2Config(**GPT2))
    source = models.source_of("bert", torch.float32, "cpu")
    assert source.kind == "encoder" and not source.random


def test_sweep_makes_a_plot_for_each_axis_and_starts_at_the_first_values(checkpoint, tmp_path, monkeypatch):
    sides = []
    monkeypatch.setattr(
        plot, "_along", lambda rows, axis, along=plot._along: sides.append((axis, along(rows, axis))) or sides[-1][1]
    )
    sweep = "--batch", 1, "--length", 8, "--streams", 2, "--streams", 4, "--new-tokens", "2,3"
    text = profile(tmp_path / "out", checkpoint("t5"), *sweep)
    assert "method: pid, which an encoder-decoder model takes" in text and "so in all 5 cases" in text
    cases = results.read(tmp_path / "out" / "profile_pid.json").by_case()
    shapes = [(phase, dict(shape)) for _, shape, _, _, phase in cases]
    generated = [(2, 2), (4, 2), (2, 3)]
    assert [(s["streams"], s["new_tokens"]) for phase, s in shapes if phase == "generate"] == generated
    assert [s["streams"] for phase, s in shapes if phase == "first token"] == [2, 4]  # independent of the new tokens
    for axis in ("streams", "new_tokens"):
        assert (tmp_path / "out" / f"profile_pid_{axis}.png").read_bytes().startswith(b"\x89PNG")
    points = {
        axis: {(row.shape["streams"], row.shape["new_tokens"]) for row in along["generate"]} for axis, along in sides
    }
    assert points == {"streams": {(2, 2), (4, 2)}, "new_tokens": {(2, 2), (2, 3)}}


def test_what_cannot_be_fused_is_told(checkpoint, tmp_path):
    text = profile(tmp_path / "out", checkpoint("albert"), "--method", "pasta", *sizes("pasta"))
    assert "ours, fused: fuse: model must be one of" in text
    *_, row = results.read(tmp_path / "out" / "profile_pasta.json").rows
    assert row.candidate == "ours, fused" and "albert" in row.missing and row.median_s is None


@pytest.mark.parametrize(
    "kind, args, message",
    [
        (
            "bert",
            ["--method", "dect", "--streams", 2],
            "--streams: does not apply to dect, which has --batch, --length",
        ),
        ("bert", ["--method", "pasta", "--new-tokens", 2], "--new-tokens: does not apply to pasta"),
        ("bert", ["--method", "dect", "--train"], "--train: does not apply to dect"),
        ("bert", ["--method", "pid"], "--method: pid takes an encoder-decoder model"),
        ("bert", [], "--method: needed for"),
        (
            "bert",
            ["--method", "dept", "--length", 200],
            "--length: the model has 256 positions, got 200 tokens and a prompt",
        ),
        ("bert", ["--method", "dect", "--length", 3], "--length: the template and its mask leave no room"),
        ("t5", ["--batch", "1,0"], "--batch: expected positive integers"),
        ("t5", ["--length", "long"], "--length: expected positive integers"),
    ],
)
def test_refused(kind, args, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(checkpoint(kind).parent)
    assert message in profile(tmp_path / "out", kind, *args, code=2)
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "Invalid value for MODEL" in profile(tmp_path / "out", tmp_path / "empty", code=2)


def test_a_token_that_differs_fails(checkpoint, tmp_path, monkeypatch):
    def wrong(*args, shared=pid_baselines.shared, **kwargs):
        answers = shared(*args, **kwargs)
        answers.tokens[1, 0] += 1
        return answers

    monkeypatch.setattr(pid_baselines, "shared", wrong)
    text = profile(tmp_path / "out", checkpoint("t5"), *sizes("pid"), code=1)
    assert "stock and ours DISAGREE: tokens: 1 of 6 streams differ" in text
    text = profile(tmp_path / "out", checkpoint("t5"), *sizes("pid"), "--dtype", "bfloat16")
    assert "differ, as 16 bits may" in text


def test_numbers_that_differ_fail(checkpoint, tmp_path, monkeypatch):
    def extract(*args, right=dect.extract, **kwargs):
        extraction = right(*args, **kwargs)
        return dect.Extraction(extraction.features, extraction.scores + 1, extraction.empty_scores)

    monkeypatch.setattr(dect, "extract", extract)
    assert "DISAGREE: features" in profile(
        tmp_path / "out", checkpoint("bert"), "--method", "dect", *sizes("dect"), code=1
    )


def test_an_update_that_is_scaled_wrongly_fails(checkpoint, tmp_path, monkeypatch):
    class Scaled(dept.Official):
        def __init__(self, model, prompt, a, b, scale):
            super().__init__(model, prompt, a, b, 1.1 * scale)

    monkeypatch.setattr(dept, "Official", Scaled)
    assert "DISAGREE: logits" in profile(tmp_path / "out", checkpoint("t5"), "--method", "dept", *sizes("dept"), code=1)
