"""Our operators at another git revision: a worktree of it, and a process that imports it and takes turns with this
one.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..results import OURS

ROOT = Path(__file__).parents[3]
LIBRARIES = "_native", "_native_cuda"
PAUSE = 1e-3  # between runs in different processes: the threads of the previous one are still spinning


class Missing(Exception):
    """The revision lacks the operator, or its result is wrong there."""


@dataclass(frozen=True)
class Checkout:
    """A commit of the repository that this package runs from."""

    ref: str
    commit: str
    root: Path


def checkout_of(ref: str, root: Path = ROOT) -> Checkout:
    """Resolve ``ref`` in the repository at ``root``.

    Raises:
        ValueError: no such revision, or the package does not run from its own checkout.
    """
    if shutil.which("git") is None:
        raise ValueError("--against needs git, which is not installed")
    top = _git(root, "rev-parse", "--show-toplevel")
    if top.returncode or Path(top.stdout.strip()).resolve() != root.resolve():
        raise ValueError(f"--against needs the package to run from its own git checkout, and {root} is none")
    commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if commit.returncode:
        raise ValueError(f"--against must name a revision of {root}, got {ref!r}")
    return Checkout(ref, commit.stdout.strip(), root)


@contextmanager
def running(checkout: Checkout, device: str) -> Iterator["Revision"]:
    """Run the revision in a process; the process and its worktree are removed afterwards, also after an error."""
    with tempfile.TemporaryDirectory(prefix="peft_kernels-") as folder:
        tree = Path(folder) / "tree"
        try:
            _git(checkout.root, "worktree", "add", "--quiet", "--detach", str(tree), checkout.commit).check_returncode()
            provide_libraries(checkout, tree)
            with (Path(folder) / "errors").open("w+") as errors:
                revision = Revision(checkout.ref, tree, device, errors)
                try:
                    revision.answer()
                    yield revision
                finally:
                    revision.close()
        finally:
            _git(checkout.root, "worktree", "remove", "--force", "--force", str(tree))


def provide_libraries(checkout: Checkout, tree: Path):
    """Provide the libraries that this checkout has, so that both sides are comparable: copied if their sources agree,
    otherwise built.
    """
    package = checkout.root / "peft_kernels"
    here = [name for name in LIBRARIES if (package / f"{name}.so").exists()]
    if not here:
        return
    if not _git(checkout.root, "diff", "--quiet", checkout.commit, "--", "csrc", "setup.py").returncode:
        for name in here:
            shutil.copy(package / f"{name}.so", tree / "peft_kernels")
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    build = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # a library that does not build leaves its reason in a text file, and setup.py still exits with 0
    if build.returncode or not all((tree / "peft_kernels" / f"{name}.so").exists() for name in here):
        raise SystemExit(f"peft-kernels bench: building {checkout.ref} failed:\n{build.stdout[-2000:]}")


class Revision:
    """The process of a revision: one line of JSON per question, one per answer."""

    def __init__(self, ref: str, tree: Path, device: str, errors):
        self.ref, self.candidate, self.errors = ref, f"{OURS} at {ref}", errors
        command = [
            sys.executable,
            str(Path(__file__).with_name("revision_worker.py")),
            str(tree),
            device,
            str(torch.get_num_threads()),
            str(PAUSE),
        ]
        # in its own session Ctrl-C does not reach it: this process ends it
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=tree,
            start_new_session=True,
        )

    def prepare(self, case) -> "Elsewhere":
        """Prepare a case in the process.

        Raises:
            Missing: the revision cannot run it, with the reason.
        """
        answer = self.ask(
            operator=case.operator.name,
            shape=case.shape,
            variant=case.variant,
            dtype=case.dtype,
            backward=case.backward,
        )
        if "missing" in answer:
            raise Missing(answer["missing"])
        return Elsewhere(self, answer["error"])

    def ask(self, **question) -> dict:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"peft-kernels bench: the process of {self.ref} ended:\n{self.errors.read()[-2000:]}")
        return json.loads(line)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@dataclass(frozen=True)
class Elsewhere:
    """A function prepared by a revision, as ``SelfTimed``."""

    revision: Revision
    error: float

    def __call__(self):
        self.seconds()

    def seconds(self) -> float:
        answer = self.revision.ask(run=True)
        time.sleep(PAUSE)
        return answer["seconds"]


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
