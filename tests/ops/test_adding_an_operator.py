"""docs/adding-an-operator.md with a toy: its folder and a line in ops/__init__.py are all that the commands need."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
PACKAGE = Path(__file__).parents[2] / "peft_kernels"

INIT = '''"""A factor for every row."""

import torch

from ..implementations import Implementations

implementations = Implementations(__name__, "reference")
library = torch.library.Library("peft_kernels", "FRAGMENT")
library.define("scale_rows(Tensor x, Tensor factor, str impl) -> Tensor")


def scale_rows(x, factor, *, impl="auto"):
    implementations.check("scale_rows", impl)
    return torch.ops.peft_kernels.scale_rows(x, factor, impl)


@torch.library.impl(library, "scale_rows", "CompositeExplicitAutograd")
def forward(x, factor, impl):
    return implementations.resolve("scale_rows", impl, x.device.type, x.dtype).forward(x, factor)
'''
REFERENCE = '''"""The mathematics."""


def unavailable(device, dtype):
    return None


def forward(x, factor):
    return x * factor[:, None]
'''
COST = '''"""Each input read once, the output written once."""
from ..cost import Cost


def scale_rows(x, factor, *, backward=False):
    return Cost(2 * x.nbytes + factor.nbytes, x.numel())
'''
PROBLEMS = '''"""The toy against one line of PyTorch."""
from . import cost, scale_rows
from ..problem import Candidate, Operator, Problem, RandomInputs, plain


def problem(shape, variant, dtype, device, backward):
    inputs = RandomInputs(device, dtype)
    x, grad = inputs.normal(shape["B"], shape["d"]), inputs.normal(shape["B"], shape["d"])
    factor = inputs.normal(shape["B"])
    return Problem(
        leaves=(x, factor),
        grads=(grad,),
        ours=lambda impl: Candidate(lambda *leaves: scale_rows(*leaves, impl=impl)),
        truth=lambda x, factor: x * factor[:, None],
        cost=cost.scale_rows,
        baselines={"one line": plain(lambda x, factor: x * factor[:, None])},
    )


SHAPES = ({"B": 8, "d": 16},)
OPERATORS = {
    "scale_rows": Operator(
        name="scale_rows", title="Scaled rows", about="B rows of width d", shapes=SHAPES, quick_shapes=SHAPES,
        problem=problem, has_backward=False,
    )
}
'''
FILES = {"__init__.py": INIT, "reference.py": REFERENCE, "cost.py": COST, "problems.py": PROBLEMS}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(PACKAGE, root / "peft_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    folder = root / "peft_kernels/ops/scale_rows"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    init = root / "peft_kernels/ops/__init__.py"
    text = init.read_text().replace(
        "from .special_tokens import", "from .scale_rows import scale_rows\nfrom .special_tokens import"
    )
    init.write_text(
        text.replace('    "label_cross_attention",\n]', '    "label_cross_attention",\n    "scale_rows",\n]')
    )
    return root


def run(tree, *command):
    done = subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_commands_have_it(tree):
    assert "scale_rows" in run(tree, "-m", "peft_kernels", "info")
    shown = run(
        tree,
        "-m",
        "peft_kernels",
        "bench",
        "scale_rows",
        "--quick",
        "--dtype",
        "float32",
        "--repeats",
        "2",
        "--out",
        "out",
    )
    assert "scale_rows, B=8 d=16, float32, forward" in shown and "one line" in shown
    run(tree, "-m", "peft_kernels", "report", "out", "--out", "page.html")
    assert "Scaled rows" in (tree / "page.html").read_text()


def test_what_it_does_not_declare_is_not_asked_for(tree):
    run(tree, "-c", "from peft_kernels.ops import tuned; assert 'scale_rows' not in tuned.kernels()")
