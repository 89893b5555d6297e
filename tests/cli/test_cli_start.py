"""The command line before torch is imported: it reports bad input, and Ctrl-C ends it; each test runs a new process."""

import os
import subprocess
import sys

import pytest

from peft_kernels import ops
from peft_kernels.cli import commands
from peft_kernels.ops.tuned import kernels
from peft_kernels.perf.sigint import INTERRUPTED

RUN = """
import os, runpy, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

if {module!r}:
    sys.meta_path.insert(0, Interrupting())
try:
    runpy.run_module("peft_kernels", run_name="__main__")
except SystemExit as end:
    sys.exit("torch was imported" if not {module!r} and "torch" in sys.modules else end.code)
"""


def run(arguments: str, folder, interrupted_at: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUN.format(module=interrupted_at), *arguments.split()]
    environment = {**os.environ, "COLUMNS": "300", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("nothing", "No such command 'nothing'"),
        ("demo --new-tokens 0", "'--new-tokens'"),
        ("demo --limit 3", "is of --data, which is not given"),
        ("demo --input file", "--input: file is an empty file"),
        ("demo --model ./nowhere", "got './nowhere', no folder"),
        ("demo --model nothing", "--model: "),
        ("bench softmax", "got 'softmax'"),
        ("bench --out file/below", "--out: cannot write to file/below"),
        ("profile /nowhere", "got '/nowhere', no folder"),
        ("profile t5-base --batch 0", "--batch: expected positive integers"),
        ("tune softmax", "'softmax'"),
        ("report nowhere", "nowhere"),
    ],
)
def test_bad_input_is_answered_without_torch(arguments, message, tmp_path):
    """Importing torch takes longer than such a reply may take."""
    (tmp_path / "file").touch()
    done = run(arguments, tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="os.kill ends a process of Windows")
@pytest.mark.parametrize(
    "module", ["peft_kernels.cli.commands", "typer", "torch", "torch.nn", "peft_kernels.ops", "transformers"]
)
def test_interrupted_while_it_imports(module, tmp_path):
    done = run("info", tmp_path, interrupted_at=module)
    assert done.returncode == INTERRUPTED and "Traceback" not in done.stderr, done.stderr


def test_names_of_operators_are_known_without_torch():
    assert commands._operator_names() == ops.__all__
    assert {operator.value for operator in commands.Operator} == set(kernels())
