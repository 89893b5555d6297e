"""`peft-kernels bench` on tiny shapes: it measures all candidates, detects wrong ones, and writes what it shows; no
measured number is checked.
"""

import csv
import functools
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from peft_kernels import ops
from peft_kernels.cli.commands import app
from peft_kernels.ops import registry as cases
from peft_kernels.ops.problem import Candidate
from peft_kernels.perf import measure, results
from peft_kernels.perf.bench import command as operators_command
from peft_kernels.perf.bench import revision
from peft_kernels.perf.bench.runner import Case, checked, compare, truth

ROOT = Path(__file__).parents[2]
LIMITS = measure.Peaks(bandwidth=1e9, rate=1e9)
TINY = {
    "shared_cross_attention": "b=2,M=3,t=2,n=8,H=2,D=16",
    "decomposed_prompt_embedding": "B=4,L=5,m=2,r=2,d=16",
    "special_token_slots": "B=3,S=8,k=2",
    "special_token_add": "B=3,S=8,d=16,k=2",
    "special_token_add_": "B=3,S=8,d=16,k=2",
    "add_layer_norm_inject": "B=3,S=8,d=16,k=2",
    "add_inject_layer_norm": "B=3,S=8,d=16,k=2",
    "label_logits": "B=3,S=4,V=50,H=16,C=2,w=2",
    "prototype_scores": "N=6,H=16,D=8,C=3",
    "prototype_cross_entropy": "N=6,H=16,D=8,C=3",
    "prototype_objective": "N=6,H=16,D=8,C=3",
    "label_cross_attention": "B=3,n=8,d=16,num_heads=2,S=3",
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """One thread, fixed peaks, two turns, and a torch.compile that fails as it does without a compiler."""

    def compile(*_, **__):
        raise RuntimeError("no C++ compiler was found\nand a long explanation")

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(operators_command, "peaks", lambda dtype, device: LIMITS)
    monkeypatch.setattr(operators_command, "SECONDS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bench(name, out, *options, code=0):
    """Run the command; returns its output and rows."""
    arguments = ["bench", name, "--shapes", TINY[name], "--repeats", "2", "--out", str(out), *options]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output, results.read(out / "operators.json").rows


def refused(*arguments):
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "400", "TERM": "dumb"})
    assert result.exit_code == 2, result.output
    return result.output


def case(name, backward=False, dtype="float32", variant=""):
    operator = cases.operator(name)
    return Case(operator, operators_command.parsed(TINY[name], operator), variant, dtype, backward)


def test_every_public_operator_has_cases():
    assert sorted(ops.__all__) == sorted(TINY)
    for name in ops.__all__:
        operator = cases.operator(name)
        assert operator.name == name and operator.quick_shapes
        assert all(list(shape) == operator.letters for shape in operator.shapes + operator.quick_shapes)


@pytest.mark.parametrize("name", ops.__all__)
def test_every_way_is_right_and_in_the_files(name, tmp_path):
    output, rows = bench(name, tmp_path)
    operator = cases.operator(name)
    by_case = {}
    for row in rows:
        assert row.candidate in output
        by_case.setdefault((row.variant, row.dtype, row.phase), []).append(row)
    phases = ["forward", "forward + backward"] if operator.has_backward else ["forward"]
    assert set(by_case) == {(v, d, p) for v in operator.variants for d in operator.default_dtypes for p in phases}
    for candidates in by_case.values():
        assert candidates[0].candidate == "ours" and candidates[0].ratio == 1
        timed, missing = ([row for row in candidates if bool(row.missing) == wanted] for wanted in (False, True))
        assert len(timed) >= 2
        for row in timed:
            assert row.median_s > 0 and row.ratio > 0 and row.runs == 2 and row.spread is not None
            assert 0 <= row.error < 2e-2 and row.bytes > 0 and row.roofline_s > 0
        for row in missing:
            assert (
                row.missing in ("no C++ compiler was found", "CUDA only", "measured on CUDA only")
                and row.median_s is None
            )
            assert f"missing {row.candidate}: {row.missing}" in output
    with (tmp_path / "operators.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert [(r["benchmark"], r["candidate"], r["missing"]) for r in listed] == [
        (r.benchmark, r.candidate, r.missing or "") for r in rows
    ]
    assert [float(r["median_s"]) for r in listed if r["median_s"]] == [r.median_s for r in rows if r.median_s]


def test_a_compiled_baseline_is_timed(monkeypatch):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    monkeypatch.undo()
    rows = compare(case("special_token_slots"), "cpu", LIMITS, repeats=2, seconds=0)
    assert [row.missing for row in rows if "compiled" in row.candidate] == [None]


def wrong(function):
    return functools.wraps(function)(lambda *args, **kwargs: 1.001 * function(*args, **kwargs))


def test_a_wrong_operator_fails_the_command_after_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "special_token_add", wrong(ops.special_token_add))
    output, rows = bench("special_token_add", tmp_path, "--dtype", "float32", code=1)
    assert "ours failed" in output and "wrong: error 1.0e-03" in output
    for row in rows:
        assert (row.missing or "").startswith(
            "wrong" if row.candidate == "ours" else "no C++" if "compiled" in row.candidate else ""
        )
        assert row.ratio is None and (row.missing or row.median_s > 0)
    assert {row.phase for row in rows} == {"forward", "forward + backward"}


def test_a_wrong_implementation_that_auto_does_not_take_fails_too(tmp_path, monkeypatch):
    function = ops.label_cross_attention
    explicit = functools.wraps(function)(
        lambda *args, impl, **kwargs: function(*args, impl=impl, **kwargs) * (1.001 if impl == "explicit" else 1)
    )
    monkeypatch.setattr(ops, "label_cross_attention", explicit)
    output, _ = bench("label_cross_attention", tmp_path, "--dtype", "float32", "--phase", "forward", code=1)
    assert "ours, explicit failed" in output and "ours failed" not in output


def test_a_shape_that_does_not_fit_costs_no_other_row(tmp_path):
    fits = TINY["label_cross_attention"]
    output, rows = bench(
        "label_cross_attention",
        tmp_path,
        "--shapes",
        fits.replace("num_heads=2", "num_heads=3"),
        "--dtype",
        "float32",
        code=1,
    )
    assert {row.shape["num_heads"]: bool(row.missing) for row in rows if row.candidate == "ours"} == {2: False, 3: True}
    assert "ours failed" in output


def test_a_wrong_baseline_is_missing(tmp_path, monkeypatch):
    module = import_module("peft_kernels.ops.special_tokens.problems")
    official = module.official_add
    monkeypatch.setattr(module, "official_add", lambda *args: wrong(official(*args)))
    output, rows = bench("special_token_add", tmp_path, "--dtype", "float32", "--phase", "forward")
    assert [row.missing for row in rows if row.candidate == "official"] == [
        "wrong: error 1.0e-03, at most 1e-05 is right"
    ]
    assert rows[0].ratio == 1


@pytest.mark.parametrize("change", [lambda x: x[..., :1], lambda x: x * float("nan")])
def test_other_shapes_and_nan_are_wrong(change):
    added = case("special_token_add")
    problem = added.problem("cpu")
    ours = problem.ours("auto").compute
    with pytest.raises(ValueError, match="wrong: "):
        checked(Candidate(lambda *leaves: change(ours(*leaves))), problem, truth(problem, False), added, "cpu")


def test_what_a_ratio_is():
    timings = {"other": measure.Timing((1.0, 10.0, 3.0)), "ours": measure.Timing((2.0, 5.0, 1.0))}
    same = {"benchmark": "x", "shape": {}, "dtype": "float32", "phase": "forward"}
    assert [row.ratio for row in results.compared(timings, **same)] == [2.0, 1.0]


def test_bad_requests_say_what_was_expected(tmp_path):
    assert "shared_cross_attention, decomposed_prompt_embedding" in refused("attention")
    assert "exactly one operator" in refused("--shapes", "B=1")
    text = refused("special_token_add", "--shapes", "B=2,S=8,d=16,q=1")
    assert "B=<size>,S=<size>,d=<size>,k=<size>" in text and "'q=1'" in text
    assert "has no k" in refused("special_token_add", "--shapes", "B=2,S=8,d=16")
    assert "'S=0'" in refused("special_token_add", "--shapes", "B=2,S=0,d=16,k=1")
    assert "prototype_scores has float32: nothing to measure" in refused("prototype_scores", "--dtype", "float16")
    assert "no backward pass" in refused("special_token_slots", "--phase", "backward")
    assert "--against" in refused("label_logits", "--against", "no such revision")


def test_what_has_nothing_to_measure_is_named(capsys):
    console = Console(width=200)
    cases = operators_command.asked([], ["float16"], [], "backward", True, console)
    assert "prototype_scores has float32" in capsys.readouterr().out
    assert {case.dtype for case in cases} == {"float16"} and all(case.backward for case in cases)


@pytest.fixture
def repository(tmp_path):
    """This package as a small repository with a commit in which one operator is wrong and one is missing."""
    root = tmp_path / "repository"
    shutil.copytree(
        ROOT / "peft_kernels", root / "peft_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__", "bench")
    )
    package = root / "peft_kernels" / "ops" / "__init__.py"
    package.write_text(package.read_text().replace('    "special_token_slots",\n', ""))
    reference = root / "peft_kernels" / "ops" / "label_logits" / "reference.py"
    reference.write_text(reference.read_text().replace("words + bias", "words - bias"))
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"],
    ):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def test_against_another_revision(repository):
    checkout = revision.checkout_of("HEAD", repository)
    names = "special_token_add_", "special_token_slots", "label_logits"
    with revision.running(checkout, "cpu") as other:
        rows = {name: compare(case(name), "cpu", LIMITS, repeats=2, seconds=0, revision=other) for name in names}
        process = other.process
    added, slots, logits = (rows[name][-1] for name in names)
    assert {row.candidate for row in (added, slots, logits)} == {"ours at HEAD"}
    assert added.median_s > 0 and added.ratio > 0 and added.error < 1e-5 and added.runs == 2
    assert slots.missing == "this revision has no operator of that name"
    assert logits.missing.startswith("wrong: error")
    assert process.poll() is not None
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1


def test_a_worktree_is_gone_after_an_interruption(repository, monkeypatch):
    monkeypatch.setattr(revision, "provide_libraries", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt), revision.running(revision.checkout_of("HEAD", repository), "cpu"):
        pass
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1


def test_against_wants_a_checkout_of_its_own(repository, tmp_path):
    with pytest.raises(ValueError, match="must name a revision"):
        revision.checkout_of("no such revision", repository)
    with pytest.raises(ValueError, match="its own git checkout"):
        revision.checkout_of("HEAD", repository / "peft_kernels")


def test_pytest_benchmark_has_the_same_cases():
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-quick",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
    ]
    result = subprocess.run([*command, "-k", "prototype_objective"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "2 passed" in result.stdout, result.stdout + result.stderr
