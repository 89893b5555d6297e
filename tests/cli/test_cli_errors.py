"""Mistakes on the command line: one sentence and exit status 2 before anything is measured; and interrupted runs."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, WhisperConfig
from typer.testing import CliRunner

from peft_kernels import demo
from peft_kernels.cli import info
from peft_kernels.cli.commands import app
from peft_kernels.perf import interruption, measure, pid_baselines, results
from peft_kernels.perf.bench import command as operators_command
from peft_kernels.perf.profile import run as profile_run
from peft_kernels.perf.tune import search as tune
from peft_kernels.perf.workloads import WordIds

T5 = {
    "vocab_size": 32128,
    "d_model": 16,
    "d_ff": 16,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 1,
    "d_kv": 16,
}
BERT = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
BART = {
    "vocab_size": 40000,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 1,
    "decoder_attention_heads": 1,
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with files that users pass by mistake; nothing else is written there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


@pytest.fixture
def nothing_runs(monkeypatch):
    """Bad input is reported before a model is built or anything is timed."""

    def never(*args, **kwargs):
        raise AssertionError("bad input was not noticed in time")

    for module, name in (
        (pid_baselines, "t5_base"),
        (demo, "run"),
        (operators_command, "peaks"),
        (profile_run, "source_of"),
    ):
        monkeypatch.setattr(module, name, never)


def invoke(*args, code=2):
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


FILES = {
    "binary": b"\xff\xfe\x00\x01",
    "zeros": b"a\0b",
    "latin1": "café".encode("latin-1"),
    "empty": b" \n\n",
    "object.json": b"{}",
    "list.json": b"[]",
    "number.json": b"[3]",
    "turns.json": b'[{"dialogue": [{"transcript": "no system_transcript"}]}]',
    "silent.json": b'[{"dialogue": []}]',
    "broken.json": b"[1,",
    "good.json": b'[{"dialogue": [{"system_transcript": "", "transcript": "hello"}]}]',
}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "command, message",
    [
        ("demo --input binary", "--input: binary must be text in UTF-8, got byte 0xff at 0"),
        ("demo --input zeros", "--input: zeros must be text in UTF-8, got a byte of 0 at 1"),
        ("demo --input latin1", "--input: latin1 must be text in UTF-8, got byte 0xe9 at 3"),
        ("demo --input empty", "--input: empty is an empty file"),
        ("demo --input folder", "is a directory"),
        ("demo --prompts latin1", "--prompts: latin1 must be text"),
        ("demo --prompts empty", "--prompts: empty is an empty file"),
        (
            "demo --data object.json",
            "--data: object.json must be a list of dialogues, got an object without anything in it",
        ),
        ("demo --data list.json", "--data: list.json must be a list of dialogues, got a list without anything in it"),
        ("demo --data number.json", "--data: dialogue 0 of number.json must have 'dialogue'"),
        ("demo --data turns.json", "--data: dialogue 0 of turns.json must have 'dialogue'"),
        ("demo --data silent.json", "--data: dialogue 0 of silent.json must have 'dialogue'"),
        ("demo --data broken.json", "--data: broken.json must be JSON: Expecting value: line 1 column 4"),
        ("demo --data latin1", "--data: latin1 must be text in UTF-8"),
        ("demo --data good.json", "--data: expected the slots in ontology_en.json, and there is no such file"),
        ("demo --data good.json --input empty", "leave --input and --prompts out"),
        ("demo --limit 3", "--limit: is of --data, which is not given"),
        ("demo --batch-size 3", "--batch-size: is of --data"),
        ("demo --new-tokens 0", "'--new-tokens'"),
        ("demo --new-tokens 99999999999999999999", "'--new-tokens'"),
        (
            "demo --model ./nowhere",
            "--model: expected a folder or the id of a model on the hub, got './nowhere', no folder",
        ),
        ("demo --model empty", "--model: expected a folder or the id of a model on the hub, got 'empty', a file"),
        ("demo --tokenizer a/b/c", "--tokenizer: expected a folder"),
        ("demo --out empty/below", "--out: cannot write to empty/below"),
        ("bench --out empty/below", "--out: cannot write to empty/below"),
        ("bench label_logits softmax", "got 'softmax'"),
        ("bench label_logits --shapes B=0", "--shapes of label_logits must be"),
        ("bench --against nothing", "--against"),
        ("profile t5-base --out empty/below", "--out: cannot write to empty/below"),
        (
            "profile t5-base --batch 1,99999999999999999999",
            "--batch: expected positive integers with commas between them, at most 1,048,576",
        ),
        ("profile /nowhere", "MODEL: expected a folder or the id"),
        ("tune --out empty/below/file.json", "--out: cannot write to empty/below"),
        ("report folder", "folder: expected result files (*.json), found none"),
    ],
)
def test_refused_before_anything_is_measured(command, message, here):
    for name, content in FILES.items():
        (here / name).write_bytes(content)
    (here / "folder").mkdir()
    assert message in invoke(*command.split())
    assert {path.name for path in here.rglob("*")} == {*FILES, "folder"}


@pytest.fixture
def checkpoint(here):
    """A tiny model in a folder, with its configuration and a word tokenizer unless the test removes them."""

    def make(model, **broken):
        model.save_pretrained(here / "model")
        for name, content in broken.items():
            (here / "model" / name.replace("__", ".")).write_text(content)
        return here / "model"

    return make


@pytest.mark.parametrize(
    "model, broken, message",
    [
        (
            lambda: BertForMaskedLM(
                BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
            ),
            {},
            "model of text, got model",
        ),
        (lambda: WhisperConfig(), {}, "expected an encoder-decoder model of text, got model, which is whisper"),
        (lambda: pid_baselines.t5_base(**T5), {"config__json": "{"}, "not a valid JSON"),
        (lambda: pid_baselines.t5_base(**T5), {}, "--model: "),  # no tokenizer
    ],
)
def test_demo_refuses_what_is_no_model_for_it(model, broken, message, checkpoint, monkeypatch):
    checkpoint(model(), **broken)
    monkeypatch.setattr(pid_baselines, "load", None)
    assert message in invoke("demo", "--model", "model")


def test_demo_refuses_weights_that_cannot_be_read(checkpoint, monkeypatch):
    checkpoint(pid_baselines.t5_base(**T5), model__safetensors="nonsense")
    monkeypatch.setattr(demo, "tokenizer", lambda name: WordIds())
    assert "--model: " in invoke("demo", "--model", "model")
    assert "MODEL: model cannot be loaded: " in invoke("profile", "model", "--quick")


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--input-tokens: the encoder has 64 positions, got 512 tokens and a prompt of 8"),
        (
            ["--input-tokens", 9, "--new-tokens", 60],
            "--new-tokens: the decoder has 64 positions, got a prompt of 8 tokens, its start and 60 new ones",
        ),
    ],
)
def test_demo_refuses_more_tokens_than_positions(options, message, checkpoint, monkeypatch):
    checkpoint(BartForConditionalGeneration(BartConfig(**BART, max_position_embeddings=64)))
    monkeypatch.setattr(demo, "tokenizer", lambda name: WordIds())
    assert message in invoke("demo", "--model", "model", *options)


def test_demo_refuses_ids_that_the_model_does_not_have(monkeypatch):
    monkeypatch.setattr(
        pid_baselines,
        "t5_base",
        lambda dtype, device, build=pid_baselines.t5_base: build(dtype, device, **{**T5, "vocab_size": 50}),
    )
    assert "--tokenizer: it has an id of" in invoke("demo")


def interrupt(monkeypatch, after: int, error=KeyboardInterrupt):
    """Press Ctrl-C in a timed run, after ``after`` runs."""
    count = 0

    def clock(function, right=measure._wall_clock):
        nonlocal count
        count += 1
        if count > after:
            raise error
        return right(function)

    monkeypatch.setattr(measure, "_wall_clock", clock)


@pytest.mark.parametrize("after, candidates, runs", [(1, 2, 1), (4, 3, 2)])
def test_interrupted_demo_keeps_what_it_has(after, candidates, runs, here, monkeypatch):
    """Keeps the first run of a decoder method, or complete turns."""
    monkeypatch.setattr(
        pid_baselines, "t5_base", lambda dtype, device, build=pid_baselines.t5_base: build(dtype, device, **T5)
    )
    (here / "prompts").write_text("what is it?\nwhere?\n")
    interrupt(monkeypatch, after)
    options = "--input-tokens", 8, "--new-tokens", 2, "--repeats", 3, "--prompts", "prompts", "--out", "out"
    assert "interrupted: what was written is partial" in invoke("demo", *options, code=interruption.INTERRUPTED)
    written = json.loads((here / "out" / "demo.partial.json").read_text())
    assert (
        written["partial"] is True and len(written["results"]) == candidates and written["results"][1]["runs"] == runs
    )
    assert written["tokens"] == {"streams": 2, "different": 0}  # both completed their first run
    assert [path.name for path in (here / "out").iterdir()] == ["demo.partial.json"]


@pytest.mark.parametrize("after, rows", [(3, 3), (9, 6)])
def test_interrupted_profile_keeps_its_cases(after, rows, checkpoint, here, monkeypatch):
    """Six runs are a complete case, three a turn of all candidates."""
    checkpoint(pid_baselines.t5_base(**{**T5, "vocab_size": 64}))
    monkeypatch.setattr(profile_run, "self_times", lambda *_: {"aten::mm": 1.0})  # the profiler takes seconds to start
    interrupt(monkeypatch, after)
    sizes = "--batch", 1, "--length", 8, "--streams", 2, "--new-tokens", 2, "--repeats", 2, "--out", "out"
    assert "interrupted: what was written is partial" in invoke(
        "profile", "model", *sizes, code=interruption.INTERRUPTED
    )
    written = results.read(here / "out" / "profile_pid.partial.json")
    assert written.partial and len(written.rows) == rows
    assert not (here / "out" / "profile_pid.json").exists()


def test_whole_results_take_the_place_of_partial_ones(here):
    partial = results.measured([], "cpu", partial=True)
    for content, names in (
        (partial, ["x.partial.csv", "x.partial.json"]),
        (replace(partial, partial=False), ["x.csv", "x.json"]),
    ):
        assert content.write(here / "x.json").name == names[1]
        assert sorted(path.name for path in here.iterdir()) == names
        assert results.read(here / names[1]).partial == content.partial


@pytest.mark.parametrize("error, ends_as", [(KeyboardInterrupt, interruption.typer.Exit), (MemoryError, MemoryError)])
def test_what_stops_a_run_waits_until_its_results_are_written(error, ends_as):
    with interruption.Keeping([1]) as kept:
        raise error
    with pytest.raises(ends_as):
        kept.end(interruption.Console())
    with pytest.raises(error), interruption.Keeping([]):  # nothing to write
        raise error


def test_interrupted_bench_is_partial_and_leaves_whole_results_alone(here, monkeypatch):
    command = "bench", "label_logits", "--quick", "--dtype", "float32", "--repeats", 2, "--out", "out"
    monkeypatch.setattr(operators_command, "peaks", lambda *_: measure.Peaks(1e9, 1e9))
    monkeypatch.setattr(operators_command, "QUICK_SECONDS", 0.01)
    rows = [
        results.Row(benchmark="b", shape={"B": 1}, dtype="float32", phase="forward", candidate="ours", median_s=1.0)
    ]
    done = []

    def compare(case, *args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.append(case)
        return rows

    (here / "out").mkdir()
    (here / "out" / "operators.json").write_text("whole")
    monkeypatch.setattr(operators_command, "compare", compare)
    assert "partial" in invoke(*command, code=interruption.INTERRUPTED)
    written = results.read(here / "out" / "operators.partial.json")
    assert written.partial and len(written.rows) == 1
    assert (here / "out" / "operators.partial.csv").exists() and (
        here / "out" / "operators.json"
    ).read_text() == "whole"


def test_interrupted_tune_saves_what_it_found(here, monkeypatch):
    saved = []

    def search(problem, *_):
        if saved or problem.site.kernel == "backward":
            raise KeyboardInterrupt
        return problem

    problems = [SimpleNamespace(site=SimpleNamespace(kernel=kernel)) for kernel in ("forward", "backward")]
    monkeypatch.setattr(tune, "targets", lambda *_: problems)
    monkeypatch.setattr(tune, "search", search)
    monkeypatch.setattr(tune, "save", lambda path, device, outcomes, console: saved.extend(outcomes))
    monkeypatch.setattr(tune, "table", lambda *_: "")
    monkeypatch.setattr(tune, "mistakes", lambda *_: [])
    with pytest.raises(interruption.typer.Exit):
        tune.tune(
            ["label_logits", "prototype_scores"],
            [torch.float32],
            torch.device("cpu"),
            here / "x.json",
            None,
            1,
            interruption.Console(),
        )
    assert saved == problems[:1]


def a_result(**fields):
    row = {
        "benchmark": "label_logits",
        "shape": {"B": 1},
        "dtype": "float32",
        "phase": "forward",
        "candidate": "ours",
        "median_s": 1.0,
        "runs": 2,
    }
    environment = {**measure.environment(), "date": "2026-01-02T03:04:05+00:00"}
    return {
        "schema": 2,
        "device": "cpu",
        "device_name": "A CPU",
        "environment": environment,
        "rows": [row],
        "peaks": {},
        **fields,
    }


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "expected JSON"),
        (b"\xff", "expected JSON"),
        (b"[]", "expected results of schema 2, got None"),
        (b'{"schema": 2}', "got KeyError: 'rows'"),
        (json.dumps(a_result(rows=[{"nothing": 1}])).encode(), "nothing"),
        (json.dumps(a_result(environment={"date": ""})).encode(), "whose environment has cores, cpu"),
        (json.dumps(a_result(peaks=3)).encode(), "expected results of schema 2"),
    ],
)
def test_report_names_the_file_that_is_wrong(content, message, here):
    (here / "found.json").write_bytes(content)
    text = invoke("report", here)
    assert "found.json: " in text and message in text
    assert not (here / "report.html").exists()


def test_report_says_what_is_partial(here):
    (here / "found.partial.json").write_text(json.dumps(a_result(partial=True)))
    (here / "page.md").write_text("<!-- figures -->\n<!-- /figures -->\n")
    invoke("report", here, "--out", "below/report.html", "--figures", "page.md", code=0)
    assert (here / "below/report.html").read_text().count("partial: the run was interrupted") == 2
    assert "of an interrupted run in part" in (here / "page.md").read_text()


def test_report_writes_nothing_where_one_page_is_wrong(here):
    (here / "found.json").write_text(json.dumps(a_result()))
    (here / "good.md").write_text("<!-- figures -->\n<!-- /figures -->\n")
    (here / "bad.md").write_text("no markers")
    text = invoke("report", here, "--figures", "good.md", "--figures", "bad.md")
    assert "--figures: bad.md: expected one <!-- figures -->" in text
    assert (here / "good.md").read_text() == "<!-- figures -->\n<!-- /figures -->\n"
    assert "--out: cannot write to found.json" in invoke("report", here, "--out", "found.json/page.html")


@pytest.mark.parametrize("columns", ["1", "20", "500"])
def test_any_width_of_terminal_and_no_colour(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in CliRunner().invoke(app, ["info"], catch_exceptions=False).output
    assert info.packages()
