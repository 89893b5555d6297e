"""The tuner on tiny targets in Triton's interpreter, with a clock that returns given times."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("triton")
from peft_kernels.cli import info
from peft_kernels.cli.commands import app
from peft_kernels.ops import triton_runtime, tuned
from peft_kernels.ops.label_logits import triton as logits
from peft_kernels.ops.problem import Sizes
from peft_kernels.perf.measure import Timing
from peft_kernels.perf.tune import search as tune
from peft_kernels.perf.tune.targets import Target, targets

TINY = Sizes(1, 4, 16, 20, 2, 3, 2, 2, 2, 1, (64,), (16,), (16,))


@pytest.fixture(autouse=True)
def here(device, tmp_path, monkeypatch):
    if reason := triton_runtime.unavailable(device.type, torch.float32):
        pytest.skip(reason)
    monkeypatch.delenv("PEFT_KERNELS_TUNED")
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path))
    tuned.entries.cache_clear()
    yield torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    tuned.entries.cache_clear()


@pytest.fixture
def target(here) -> Target:
    """The row (4, 8) of the table: eight words, BW 8 and BD 256."""
    return next(
        p
        for p in targets("label_logits", torch.float32, here, TINY)
        if p.site.kernel == "forward" and p.site.key == (4, 8)
    )


def clock(seconds, asked):
    """A timer that runs nothing: ``seconds`` maps a candidate's config to its time.

    ``asked`` collects the compared candidates.
    """

    def timer(functions):
        asked.append(list(functions))
        return {name: Timing((seconds(dict(word.split("=") for word in name.split())),)) for name in functions}

    return timer


@pytest.mark.parametrize("operator", tuned.kernels())
def test_every_problem_launches_the_row_that_it_says(operator, here, monkeypatch):
    asked = []
    default_or_tuned = tuned.options

    def options(operator, kernel, device, default, *key):
        asked.append(((operator, kernel, key), default))
        return default_or_tuned(operator, kernel, device, default, *key)

    monkeypatch.setattr(tuned, "options", options)
    kernels = set()
    for dtype in (torch.float32, torch.float16):
        for target in targets(operator, dtype, here, TINY):
            call = target.make()
            asked.clear()
            results = call()
            assert [default for site, default in asked if site == target.site] == [target.default], target.site
            assert all(x.isfinite().all() and x.any() for x in results if x is not None), target.site
            kernel = tuned.kernels()[operator][target.site.kernel]
            assert len(kernel.key) == len(target.site.key)
            options_of = {name: target.default[name] for name in (*kernel.blocks, "num_warps", "num_stages")}
            assert len(list(tune.neighbours(options_of, target.default, kernel))) >= 4
            kernels.add(target.site.kernel)
    assert kernels == set(tuned.kernels()[operator])


def test_takes_the_faster_one_step_by_step(target, here):
    asked = []
    outcome = tune.search(target, here, clock(lambda options: float(options["BD"]), asked), 8)
    assert outcome.config == {"BD": 64} and not outcome.rejected  # two steps away
    assert (outcome.default.median, outcome.best.median) == (256, 64)
    assert asked[-1] == ["BW=8 BD=256 num_warps=4 num_stages=1", "BW=8 BD=64 num_warps=4 num_stages=1"]
    assert tuned.entries(here)[target.site] == {"BD": 64}
    names = sum(asked[:-1], [])
    assert outcome.tried == len(set(names)) - 1
    asked.clear()
    assert tune.search(target, here, clock(lambda options: float(options["BD"]), asked), 1).config == {"BD": 128}


def test_keeps_the_default_where_nothing_is_faster_by_more_than_the_noise(target, here):
    tuned.entries(here)[target.site] = {"BD": 64}
    assert tune.search(target, here, clock(lambda options: 1 - 0.02 * (options["BD"] == "64"), []), 8).config is None
    assert not tuned.entries(here)[target.site]
    assert tune.is_faster(Timing((0.96,)), Timing((1.0,))) and not tune.is_faster(Timing((0.98,)), Timing((1.0,)))
    assert not tune.is_faster(Timing((0.7, 0.9, 1.1)), Timing((1.0,)))


def test_wins_only_in_the_last_comparison_too(target, here):
    """A config that is fast only once is not kept."""
    rounds = []

    def timer(functions):
        rounds.append(functions)
        return {name: Timing((0.5 if "BD=64" in name and len(rounds) < 3 else 1.0,)) for name in functions}

    assert tune.search(target, here, timer, 2).config is None


def test_refuses_what_fails_and_what_is_wrong(target, here, monkeypatch):
    kernel = logits.triton_kernels.label_logits_fwd_kernel

    class Broken:
        def __getitem__(self, grid):
            def launch(out, *args, **options):
                if options["BW"] == 4:
                    raise MemoryError("shared memory\nand a trace")
                kernel[grid](out, *args, **options)
                if options["BD"] == 128:
                    out.view(-1)[5] += 1
                if options["BD"] == 512:
                    out.view(-1)[0] = torch.nan

            return launch

    monkeypatch.setattr(logits.triton_kernels, "label_logits_fwd_kernel", Broken())
    outcome = tune.search(
        target, here, clock(lambda options: 0.1 if options["BW"] == "4" or options["BD"] != "256" else 1, []), 8
    )
    assert outcome.config is None
    reasons = {name: reason for name, reason in outcome.rejected.items() if "num_warps=4" in name}
    assert reasons.pop("BW=4 BD=256 num_warps=4 num_stages=1") == "MemoryError: shared memory"
    assert set(reasons) == {f"BW=8 BD={columns} num_warps=4 num_stages=1" for columns in (128, 512)}
    assert all(reason.startswith("wrong result: differs from the default config's by") for reason in reasons.values())
    assert len(list(tune.mistakes([outcome]))) == 4  # also with other numbers of warps


def test_neighbours_stay_within_bounds():
    kernel = tuned.kernels()["shared_cross_attention"]["forward"]
    default = {"BLOCK_D": 256, "D": 200, "BM": 64, "BN": 16, "num_warps": 8, "num_stages": 5}
    options = {name: default[name] for name in ("BM", "BN", "num_warps", "num_stages")}
    near = list(tune.neighbours(options, default, kernel))
    assert (
        {**options, "BM": 128} in near
        and {**options, "num_stages": 4} in near
        and {**options, "BN": 32, "num_warps": 16} in near
    )
    assert all(config["BN"] >= 16 and config["num_stages"] <= 5 for config in near)
    assert {**options, "BM": 128, "BN": 32, "num_warps": 4} not in tune.neighbours(
        {**options, "BM": 128, "num_warps": 4}, default, kernel
    )
    double = tuned.kernels()["shared_cross_attention"]["key_value_grad"]  # has two gradients
    assert {**options, "num_warps": 4} in near and {**options, "num_warps": 4} not in tune.neighbours(
        options, default, double
    )
    assert {config["num_stages"] for config in tune.neighbours({**options, "num_stages": 1}, default, kernel)} == {1}


def test_the_file_keeps_what_was_not_measured(target, here, tmp_path, capsys):
    console, path = Console(), tmp_path / "out.json"
    other = tuned.Entry(tuned.Site("special_tokens", "slots", ()), {"BS": 2048}, 3.0, 2.0, "2026")
    stale = tuned.Entry(target.site, {"BD": 1024}, 3.0, 2.0, "2026")
    tuned.write(path, here, [other, stale])
    faster = tune.search(target, here, clock(lambda options: float(options["BD"]), []), 8)
    tune.save(path, here, [faster], console)
    kept, saved = sorted(tuned.read(path, here), key=lambda entry: entry.site.operator, reverse=True)
    assert kept == other
    assert saved[:4] == (target.site, {"BD": 64}, 256.0, 64.0) and saved.date.startswith("20")
    tune.save(path, here, [tune.search(target, here, clock(lambda options: 1.0, []), 8)], console)
    assert tuned.read(path, here) == [other]
    path.write_text(path.read_text().replace('"peft_kernels": "', '"peft_kernels": "0.0.'))
    tune.save(path, here, [faster], console)
    assert [entry.site for entry in tuned.read(path, here)] == [target.site]
    assert "replaced" in capsys.readouterr().out


def test_the_table_has_times_and_the_faster_config(target, here, capsys):
    outcome = tune.search(target, here, clock(lambda options: float(options["BD"]), []), 8)
    Console(width=200).print(tune.table("label_logits", [outcome]))
    text = capsys.readouterr().out
    for word in ("forward", "bytes 4, words 8", "256 s", "64 s", "BD=64"):
        assert word in text


def test_info_says_what_launches_take(target, here, monkeypatch):
    path = tuned.cache_file(here)
    assert info.launch_configs(None) == {}
    assert set(info.launch_configs(here).values()) == {"default"}
    tuned.write(path, here, [tuned.Entry(target.site, {"BD": 64}, 2.0, 1.0, "2026-01-02T03:04:05+00:00")])
    configs = info.launch_configs(here)
    assert (
        "tuned" in configs["label_logits"]
        and "2026-01-02, rows: 1" in configs["label_logits"]
        and str(path) in configs["label_logits"]
    )
    assert configs["special_tokens"] == "default"
    path.write_text(json.dumps({"entries": []}))
    assert all("cannot be used" in text and "schema" in text for text in info.launch_configs(here).values())
    monkeypatch.setenv("PEFT_KERNELS_TUNED", "0")
    assert all("PEFT_KERNELS_TUNED is 0" in text for text in info.launch_configs(here).values())


def test_the_command_needs_a_gpu_and_a_known_operator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["tune", "label_logits", "--quick"])
    assert result.exit_code == 1 and "torch sees no CUDA or ROCm device" in result.output
    assert "label_logits" in CliRunner().invoke(app, ["tune", "softmax"]).output


def test_tunes_and_writes_operator_by_operator(target, here, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    monkeypatch.setattr(tune, "targets", lambda operator, dtype, device: [target] if operator == "label_logits" else [])
    operators = ["label_logits", "prototype_scores"]
    tune.tune(
        operators, [torch.float32], here, path, clock(lambda options: float(options["BD"]), []), 8, Console(width=200)
    )
    text = capsys.readouterr().out
    assert "BD=64" in text and "prototype_scores has no kernels in torch.float32" in text and str(path) in text
    (entry,) = tuned.read(path, here)
    assert entry[:2] == (target.site, {"BD": 64})
    assert not tuned.cache_file(here).exists()


def test_times_on_a_gpu(target, here):
    if here.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    outcome = tune.search(target, here, tune.on_gpu, 1)
    assert 0 < outcome.best.median <= outcome.default.median and not list(tune.mistakes([outcome]))
