"""Every module is valid in every supported version of Python, imports, and imports only packages that pyproject.toml
declares.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from python_versions import PYTHONS

from peft_kernels.hf.extra import PACKAGES

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "peft_kernels").rglob("*.py"))
NOT_DECLARED = {"sklearn"}  # its own clone() and cross_val_score() call the code that imports it


def interpreter(version: str) -> str | None:
    """The interpreter of this Python version, if installed."""
    if version == ".".join(map(str, sys.version_info[:2])):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = shutil.which(f"python{version}", path=os.pathsep.join(map(str, pyenv.glob(f"versions/{version}.*/bin"))))
    return found or shutil.which(f"python{version}")


@pytest.fixture(scope="module")
def project():
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_classifiers_name_the_versions(project):
    prefix = "Programming Language :: Python :: 3."
    assert tuple(x.removeprefix(prefix[:-2]) for x in project["classifiers"] if x.startswith(prefix)) == PYTHONS


@pytest.mark.parametrize("version", PYTHONS)
def test_compiles(version, tmp_path):
    python = interpreter(version)
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip(f"there is no Python {version}")
    everything = [
        ROOT / name for name in ("peft_kernels", "tools", "benchmarks", "examples", "scripts", "tests", "setup.py")
    ]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    done = subprocess.run(
        [python, "-m", "compileall", "-q", *everything], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_imports():
    for path in FILES:
        if path.stem != "__main__":  # it runs the command line
            import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run(code: str, missing: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing) + code], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("missing", ["transformers", "peft"])
def test_a_method_names_the_command_that_installs_what_it_lacks(missing):
    method_of = {
        "dept": "dept",
        "pasta": "pasta",
        "dect": "dect",
        "ytuning": "ytuning",
        "DePTConfig": "dept",
        "PASTAConfig": "pasta",
    }
    if missing != "peft":
        method_of["pid"] = "pid"
    statements = [f"from peft_kernels import {name}" for name in method_of]
    code = f"""
for statement in {[*statements, "import peft_kernels.dept.training"]}:
    try:
        exec(statement)
        print("nothing raised")
    except ImportError as error:
        print(type(error).__name__, error.name, error)
"""
    done = run(code, (missing,))
    assert done.returncode == 0, done.stderr
    command = 'which is not installed: pip install "peft_kernels[hf]"'
    methods = [*method_of.values(), "dept"]
    assert done.stdout.splitlines() == [
        f"ImportError {missing} peft_kernels.{method} needs {missing}, {command}" for method in methods
    ]


def test_another_missing_module_is_named_itself():
    done = run("from peft_kernels import pid", ("tokenizers",))
    assert "peft_kernels[hf]" not in done.stderr and "tokenizers" in done.stderr.splitlines()[-1]


def test_the_extra_is_the_one_of_the_project(project):
    assert {re.match(r"\w+", requirement)[0] for requirement in project["optional-dependencies"]["hf"]} == set(PACKAGES)


def test_the_package_imports_neither_transformers_nor_peft():
    done = run(
        "import peft_kernels, peft_kernels.ops; print([name for name in ('transformers', 'peft', 'triton') if name in"
        " sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_what_is_imported_is_declared(project):
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["hf"], *extras["cli"], *extras["gpu"]]
    declared = {re.match(r"\w+", requirement)[0] for requirement in requirements}
    imported = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - NOT_DECLARED <= declared


@pytest.mark.parametrize("order", ["peft_kernels, torch", "torch, peft_kernels", "peft_kernels.ops, torch"])
def test_operators_are_registered_whatever_is_imported_first(order):
    """A program saved by torch.export needs them registered; the package alone imports no torch."""
    code = (
        f"import sys, {order}; torch.ops.peft_kernels.label_logits; import peft_kernels; peft_kernels.ops.label_logits"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=ROOT, check=True)
    subprocess.run(
        [sys.executable, "-c", "import sys, peft_kernels; assert 'torch' not in sys.modules"], cwd=ROOT, check=True
    )
