"""The command line and the benchmark scripts on tiny models: they run and report true facts; no measured number is
checked.
"""

import itertools
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast
from typer.testing import CliRunner

from peft_kernels import __version__, cli, ops
from peft_kernels.cli import info
from peft_kernels.cli.commands import app
from peft_kernels.ops import native_library
from peft_kernels.perf import pid_baselines
from peft_kernels.perf.results import OURS, read
from peft_kernels.perf.workloads import WordIds, built_in

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT = "the cat sat on the mat and the dog ran to the park while it rained all day"
PROMPTS = "who sat ?\nwhere did the dog run ?\nwhat\n"
TINY = {
    "vocab_size": 64,
    "d_model": 32,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "d_kv": 16,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: tiny matmuls are slow on threads that other test processes hold up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def invoke(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(params=["t5", "bart"])
def checkpoint(request, tmp_path):
    """A tiny model and a tokenizer of words."""
    if request.param == "t5":
        model = pid_baselines.t5_base(**TINY)
    else:
        torch.manual_seed(0)
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "init_std": 0.5,
        }
        model = BartForConditionalGeneration(BartConfig(**layers, **sizes, forced_eos_token_id=None))
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(f"{TEXT} {PROMPTS}".split())]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return "--input", tmp_path / "text.txt", "--prompts", tmp_path / "prompts.txt"


def test_help_names_the_commands():
    text = invoke("--help")
    assert all(name in text for name in ("info", "demo", "bench"))


def test_version():
    assert invoke("--version") == f"peft-kernels {__version__}\n"


def test_shell_completion_is_offered():
    """The shell sets these variables to ask for completions; Typer has the scripts."""
    asked = {"_PEFT_KERNELS_COMPLETE": "complete_bash", "COMP_WORDS": "peft-kernels in", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], prog_name="peft-kernels", env=asked)
    assert result.output.split() == ["info"]


def test_info_names_every_implementation_or_the_reason():
    text = invoke("info")
    for word in ("peft_kernels", "torch", torch.__version__, "triton", "cpu", "reference"):
        assert word in text
    assert [*itertools.chain(*info.packages().values())] == ops.__all__
    assert all(operator in text for operator in ops.__all__)
    words = " ".join(text.split())
    for name in info.packages():
        for impl, devices in info.availability(name).items():
            assert impl in text
            assert set(devices) == set(info.device_types())
            for reason in [reason for reasons in devices.values() for reason in reasons.values() if reason is not None]:
                assert " ".join(reason.split("torch.")[0].split()) in words
        assert info.availability(name)["reference"]["cpu"][torch.float32] is None


def test_info_says_nothing_of_launches_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = invoke("info")
    assert "none that torch sees" in text and "launch" not in text and "default" not in text


@pytest.mark.parametrize("gpu", [False, True])
def test_info_fits_on_a_screen(gpu, monkeypatch):
    """80 columns and 40 lines, with a compiler's longest message, and with a GPU that uses tuned configs."""
    error = "csrc/cpu/x.cpp:7: error: 'y' was not declared in this scope" + 12 * " word"
    reason = f"the native library is not built (g++ failed (exit status 1): {error})"
    monkeypatch.setattr(native_library, "load_error", lambda: reason)
    if gpu:
        tuned_ones = {
            **dict.fromkeys(info.packages(), "default"),
            "label_logits": f"tuned on 2026-01-02, rows: 3, /{'long/' * 12}gpu.json",
        }
        monkeypatch.setattr(info, "device_types", lambda: ["cpu", "cuda"])
        monkeypatch.setattr(info, "gpus", lambda: ["CUDA 0: NVIDIA H100 80GB HBM3, sm_90, 80 GiB"])
        monkeypatch.setattr(info, "launch_configs", lambda device: tuned_ones)
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        info.show(console)
    lines = captured.get().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert reason in " ".join(captured.get().split()) and "…" not in captured.get()
    for package, operators in info.packages().items():
        first = next(i for i, line in enumerate(lines) if line.startswith(f"{operators[0]} "))
        assert lines[first].split()[1:3] == ["cpu", "yes"], package
        assert not gpu or "gpu yes" in lines[first + 1]


def test_info_keeps_the_names_of_operators_at_60_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = invoke("info").splitlines()
    assert all(any(line.split()[:1] == [operator] for line in lines) for operator in ops.__all__)


def test_a_footnote_names_the_dtypes_that_a_reason_holds_for():
    half, wide, brain = torch.float16, torch.float32, torch.bfloat16
    footnotes = {}
    assert info._cell({wide: None, brain: f"not {brain}", half: f"not {half}"}, footnotes) == "[green]yes[/green] 1"
    assert (
        info._cell({wide: "no GPU", brain: f"not {brain}", half: f"not {half}"}, footnotes) == "[yellow]no[/yellow] 2,1"
    )
    assert info._cell({wide: None, brain: "wrong there", half: None}, footnotes) == "[green]yes[/green] 3"
    assert [*footnotes] == ["not torch.bfloat16 and torch.float16", "no GPU", "torch.bfloat16: wrong there"]


def test_demo_on_a_checkpoint(checkpoint, files, tmp_path):
    text = invoke("demo", "--model", checkpoint, *files, "--new-tokens", 4, "--repeats", 2, "--out", tmp_path / "out")
    assert "identical" in text and "random" not in text.lower()
    written = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert written["tokens"] == {"streams": 3, "different": 0}
    assert written["environment"]["versions"]["torch"] == torch.__version__
    pie, repeated, ours = written["results"]
    assert [pie["runs"], repeated["runs"], ours["runs"]] == [1, 2, 2]
    # one generate for prompts of all lengths
    if json.loads((checkpoint / "config.json").read_text())["model_type"] == "t5":
        assert repeated["cross_kv_bytes"] == 3 * ours["cross_kv_bytes"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_on_dialogues_of_different_length(checkpoint, tmp_path):
    turn = {"system_transcript": "the dog ran", "transcript": "where did it"}
    (tmp_path / "woz.json").write_text(json.dumps([{"dialogue": [turn] * k} for k in (1, 3, 2)]))
    (tmp_path / "ontology_en.json").write_text(
        json.dumps({"requestable": ["park", "mat"], "informable": {"request": ["park"], "dog": ["x"]}})
    )
    data = "--data", tmp_path / "woz.json", "--batch-size", 2, "--new-tokens", 3, "--repeats", 1
    text = invoke("demo", "--model", checkpoint, *data, "--out", tmp_path / "out")
    assert "3 of the 3 dialogues" in text and "identical" in text
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["tokens"]["streams"] == 9
    assert "2 of the 3 dialogues" in invoke(
        "demo", "--model", checkpoint, *data, "--limit", 2, "--out", tmp_path / "out"
    )


def test_demo_without_a_checkpoint_says_that_weights_are_random(files, tmp_path, monkeypatch):
    build = pid_baselines.t5_base
    monkeypatch.setattr(
        pid_baselines, "t5_base", lambda dtype, device: build(dtype, device, **{**TINY, "vocab_size": 32128})
    )
    text = invoke("demo", *files, "--new-tokens", 2, "--repeats", 1, "--dtype", "bfloat16", "--out", tmp_path / "out")
    assert "RANDOM weights" in text


def test_demo_fails_where_a_token_differs(checkpoint, files, tmp_path, monkeypatch):
    def wrong(*args, shared=pid_baselines.shared, **kwargs):
        answers = shared(*args, **kwargs)
        answers.tokens[1, 0] += 1
        return answers

    monkeypatch.setattr(pid_baselines, "shared", wrong)
    assert "1 of 3 streams of ours DIFFER" in " ".join(
        invoke("demo", "--model", checkpoint, *files, "--out", tmp_path / "out", code=1).split()
    )


def test_one_clear_line_without_the_extra(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "rich" else object())
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r'^peft-kernels: rich not installed.*pip install "peft_kernels\[cli\]"$'):
        cli.app()


def test_built_in_workload_is_the_one_of_the_figures():
    workload = built_in()
    assert [len(x) for x in workload.inputs] == [512]
    assert [len(x) for x in workload.prompts] == [8] * 30


def test_random_weights_answer_by_input_prompt_and_step():
    model = pid_baselines.t5_base(
        **{**TINY, "vocab_size": 32128, "d_model": 64, "num_layers": 4, "num_decoder_layers": 4}
    )
    workload = built_in(64, 6)

    def answer(inputs):
        return pid_baselines.ask(
            pid_baselines.repeated, model, replace(workload, inputs=inputs), 8, full_length=True
        ).tokens.tolist()

    tokens = answer(workload.inputs)
    assert len({tuple(row) for row in tokens}) == len(tokens)
    assert len({token for row in tokens for token in row}) > len(tokens)
    assert answer([workload.inputs[0][::-1]]) != tokens


def test_word_ids_are_reversible_and_share_the_vocabulary():
    words = WordIds(vocab_size=20)
    ids = words.encode(TEXT)
    assert words.decode(ids) == TEXT and min(ids) >= 3 and max(ids) < 20
    assert len(set(ids)) == len(set(TEXT.split()))


@pytest.mark.parametrize("script", ["pid_generate", "dept_training", "pasta_layer", "dect", "ytuning_step"])
def test_benchmark_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(
        "sys.argv", [script, "--quick", "--dtype", "float32", "bfloat16", "--out", str(tmp_path / "out.json")]
    )
    runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    written = read(tmp_path / "out.json")
    assert {row.dtype for row in written.rows} == {"float32", "bfloat16"}
    assert all(OURS in [row.candidate for row in rows] for rows in written.by_case().values())
    assert "spread" in capsys.readouterr().out
