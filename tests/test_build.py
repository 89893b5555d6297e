"""setup.py: the wheel that each machine gets, and the message if a library is not in it.

The compilers are scripts that write files.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from python_versions import PYTHONS

from peft_kernels.ops import native_library

ROOT = Path(__file__).parents[1]
COMPILER = """#!/bin/sh
error() { echo "x.cpp:1: error: first"; echo "x.cpp:7: error: no such thing"; echo "compilation terminated."; exit 1; }
[ -z "$FAIL" ] || error >&2
[ "$1" != --list-gpu-code ] || { echo sm_80 sm_90; exit; }
while [ $# -gt 1 ]; do [ "$1" != -o ] || touch "$2"; shift; done
"""
TORCH = "def include_paths(): return []\ndef library_paths(): return []\n"


@pytest.fixture(scope="module")
def build():
    spec = spec_from_file_location("build_of_peft_kernels", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tree:
    """A small source tree, compilers and a torch."""

    def __init__(self, folder: Path):
        self.sources, self.bin, self.site = (folder / name for name in ("sources", "cuda/bin", "site"))
        for name in ("schema.cpp", "cpu/op.cpp", "cpu/op_kernel.cpp", "cuda/op.cu"):
            self.write(self.sources / "csrc" / name, "")
        for name in (
            "setup.py",
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "peft_kernels/__init__.py",
            "peft_kernels/version.py",
        ):
            (self.sources / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.sources / name)
        for name, text in (("__init__", ""), ("utils/__init__", ""), ("utils/cpp_extension", TORCH)):
            self.write(self.site / f"torch/{name}.py", text)
        for name in ("g++", "nvcc"):
            self.write(self.bin / name, COMPILER).chmod(0o755)

    def write(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def setup(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        inherited = {name: value for name, value in os.environ.items() if name != "PEFT_KERNELS_BUILD"}
        compilers = {
            "CC": str(self.bin / "g++"),
            "CXX": str(self.bin / "g++"),
            "CUDA_HOME": str(self.bin.parent),
            "PYTHONPATH": str(self.site),
        }
        (self.sources / "setup.py").touch()  # makes the build outdated
        everything = {**inherited, **compilers, **environment}
        return subprocess.run(
            [sys.executable, "setup.py", *command], cwd=self.sources, env=everything, capture_output=True, text=True
        )

    def wheel(self, **environment: str) -> tuple[str, dict[str, str], list[str]]:
        """Build a wheel; returns the platform in its name, its native files by name, and the last lines of the build's
        output.
        """
        shutil.rmtree(self.sources / "dist", ignore_errors=True)
        done = self.setup("bdist_wheel", **environment)
        assert done.returncode == 0, done.stderr
        (path,) = (self.sources / "dist").iterdir()
        with ZipFile(path) as archive:
            files = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if "_native" in name}
            pure = b"Root-Is-Purelib: true" in archive.read(
                next(name for name in archive.namelist() if name.endswith("/WHEEL"))
            )
        assert pure == path.stem.endswith("-any")
        return path.stem.split("-py3-none-")[1], files, done.stderr.strip().splitlines()

    def in_place(self) -> set[str]:
        return {path.name for path in (self.sources / "peft_kernels").glob("_native*")}


@pytest.fixture
def tree(tmp_path):
    if os.name != "posix":
        pytest.skip("the compilers here are shell scripts")
    return Tree(tmp_path)


def test_wheel_after_a_failure_has_nothing_of_the_wheel_before(tree):
    platform, files, _ = tree.wheel(PEFT_KERNELS_BUILD="require")
    assert platform != "any" and set(files) == {"_native.so", "_native_cuda.so"}

    platform, files, last = tree.wheel(FAIL="1")
    assert platform == "any" and set(files) == {"_native.txt", "_native_cuda.txt"}
    assert all(files[name].endswith("failed (exit status 1): x.cpp:7: error: no such thing") for name in files)
    assert any(f"WARNING: peft_kernels._native is not built: {files['_native.txt']}" in line for line in last[-4:])

    platform, files, _ = tree.wheel()
    assert platform != "any" and set(files) == {"_native.so", "_native_cuda.so"}


def test_files_in_place_do_not_slip_into_a_wheel(tree):
    for name in ("_native.so", "_native_cuda.so", "_native.txt"):
        tree.write(tree.sources / "peft_kernels" / name, "old")
    # as an older version's build in place wrote it
    manifest = "".join(f"peft_kernels/{name}\n" for name in tree.in_place())
    tree.write(tree.sources / "peft_kernels.egg-info/SOURCES.txt", manifest)
    platform, files, _ = tree.wheel(PEFT_KERNELS_BUILD="skip")
    assert platform == "any"
    assert files == dict.fromkeys(("_native.txt", "_native_cuda.txt"), "PEFT_KERNELS_BUILD=skip left it out")


def test_without_torch_as_in_an_isolated_build(tree):
    tree.write(tree.site / "torch/__init__.py", "raise ImportError")
    platform, files, _ = tree.wheel()
    assert platform == "any" and "no torch to build against, as in an isolated build" in files["_native.txt"]
    assert "no torch to build against" in tree.setup("bdist_wheel", PEFT_KERNELS_BUILD="require").stderr


def test_in_place(tree):
    assert tree.setup("build_ext", "--inplace").returncode == 0
    assert tree.in_place() == {"_native.so", "_native_cuda.so"}
    assert tree.setup("build_ext", "--inplace", FAIL="1").returncode == 0
    assert tree.in_place() == {"_native.txt", "_native_cuda.txt"}
    failed = tree.setup("build_ext", "--inplace", FAIL="1", PEFT_KERNELS_BUILD="require")
    assert failed.returncode != 0 and "error: no such thing" in failed.stderr


def test_require_asks_for_cuda_where_there_is_nvcc(tree):
    tree.write(tree.bin / "nvcc", COMPILER.replace('"$FAIL"', '"$FAIL_NVCC"'))
    platform, files, _ = tree.wheel(FAIL_NVCC="1")
    assert platform != "any" and set(files) == {"_native.so", "_native_cuda.txt"}
    assert tree.setup("bdist_wheel", FAIL_NVCC="1", PEFT_KERNELS_BUILD="require").returncode != 0


def test_a_compiler_that_is_not_there(tree):
    _, files, _ = tree.wheel(CC="/no/g++", CXX="/no/g++")
    assert "/no/g++ does not run: No such file or directory" in files["_native.txt"]


def sources() -> list[str]:
    """The files that git tracks; in an unpacked sdist, which has no git, every file in it."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        return [name for name in listed if (ROOT / name).is_file()]
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    built = ("PKG-INFO", "setup.cfg", "peft_kernels.egg-info", "__pycache__")
    return [str(path) for path in paths if not set(built) & set(path.parts) and not path.name.startswith("_native")]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The folder of an unpacked sdist, built from a copy that contains the outputs of a build in place."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in sources():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    for name in ("peft_kernels/_native.so", "peft_kernels/_native_cuda.txt", "tests/__pycache__/test_build.pyc"):
        (folder / "tree" / name).parent.mkdir(exist_ok=True)
        (folder / "tree" / name).touch()
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=gztar", "-d", str(folder)]
    done = subprocess.run(command, cwd=folder / "tree", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder / path.name.removesuffix(".tar.gz")


def test_sdist_holds_the_sources_and_nothing_built(sdist):
    files = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert {name for name in sources() if not name.startswith(".")} <= files
    assert not [name for name in files if name.endswith((".so", ".pyc")) or Path(name).name.startswith("_native")]


def test_sdist_builds_a_wheel_with_types_texts_and_page(sdist, tmp_path):
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    done = subprocess.run(
        command, cwd=sdist, env={**os.environ, "PEFT_KERNELS_BUILD": "skip"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with ZipFile(next(tmp_path.iterdir())) as archive:
        names = set(archive.namelist())
    package = [name for name in sources() if name.startswith("peft_kernels/")]
    assert set(package) <= names
    assert "peft_kernels/py.typed" in package


def test_unknown_wish(tree):
    done = tree.setup("build_ext", PEFT_KERNELS_BUILD="yes")
    assert done.returncode != 0 and "PEFT_KERNELS_BUILD must be require, skip or unset, got 'yes'" in done.stderr


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("a.cpp:1: error: one\na.cpp:2: error: two\na.cpp:2: note: here\n", "a.cpp:2: error: two"),
        ("a.h:3: fatal error: no.h: No such file\ncompilation terminated.\n", "a.h:3: fatal error: no.h: No such file"),
        (
            'a.cu(5): error: identifier "x" is undefined\n\n1 error detected in the compilation of "a.cu".\n',
            'a.cu(5): error: identifier "x" is undefined',
        ),
        (
            "/usr/bin/ld: cannot find -ltorch_cpu\ncollect2: error: ld returned 1 exit status\n",
            "/usr/bin/ld: cannot find -ltorch_cpu",
        ),
        ("", "no message"),
    ],
)
def test_last_error(build, output, line):
    assert build.last_error(output) == line


@pytest.mark.parametrize("python", PYTHONS)
def test_what_make_env_pins_runs_on_every_python(python):
    """If a release needs a newer Python, its line says so and pip takes an older release."""
    pinned = [
        Requirement(line.split("#")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.split("#")[0].strip()
    ]
    too_new = []
    for one in pinned:
        with suppress(PackageNotFoundError):
            found = metadata(one.name)
            needs = SpecifierSet(found["Requires-Python"] or "")
            here = str(one.specifier) == f"=={found['Version']}" and (
                one.marker is None or one.marker.evaluate({"python_version": python})
            )
            if here and python not in needs:
                too_new.append(f"{one} needs Python {needs}")
    assert pinned and too_new == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    "made_with, asked_for, anew",
    [
        ("torch==2.11.0", [], False),
        ("torch==2.13.0", [], True),
        ("torch==2.13.0", ["TORCH=torch==2.13.0"], False),
        ("torch==2.11.0", ["TORCH=torch==2.13.0"], True),
        ("", [], True),
        (None, [], True),
    ],
)
def test_the_oldest_environment_is_made_anew_for_another_torch(made_with, asked_for, anew, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (
        "pyproject.toml",
        "setup.py",
        "constraints.txt",
        "constraints-oldest.txt",
        "csrc/op.cpp",
        ".venv/.ready",
        ".venv-oldest/.ready",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    ready = tmp_path / ".venv-oldest/.ready"
    ready.unlink() if made_with is None else ready.write_text(made_with + "\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "TORCH")}
    done = subprocess.run(
        ["make", "-n", ".venv-oldest/.ready", *asked_for], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and ("venv --clear .venv-oldest" in done.stdout) == anew, done.stdout


def test_reason_of_a_library_that_is_not_built(tmp_path):
    library = tmp_path / "_native.so"
    assert (
        native_library.not_built(library, "x")
        == "is not built: with x, in the folder of the sources, pip install --no-build-isolation ."
    )
    library.with_suffix(".txt").write_text("g++ failed: e")
    assert native_library.not_built(library, "x").startswith("is not built (g++ failed: e): with x, ")
    library.touch()
    assert native_library.not_built(library, "x") is None
