"""scripts/gpu_check.sh without a GPU: the script runs, and says what failed."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "scripts/gpu_check.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("arguments", [(), ("D",), ("A", "--quick")])
def test_refuses_other_arguments(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and "gpu_check.sh: " in done.stderr


def test_failures_are_counted_and_packed(tmp_path):
    """With a Python that fails every step."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no module named torch\nexit 3\n")
    python.chmod(0o755)
    done = run("B", "--dry-run", PYTHON=str(python), OUT=str(tmp_path))
    assert done.returncode == 1
    with tarfile.open(tmp_path / "gpu_check_B.tar.gz") as archive:
        steps = [json.loads(line) for line in archive.extractfile("gpu_check_B/steps.jsonl")]
    assert [s["step"] for s in steps] == ["warm_cache", "memcheck", "racecheck", "synccheck", "initcheck", "bench"]
    assert all(s["status"] == 3 for s in steps)
    assert [line.split("}")[1].strip() for line in done.stdout.splitlines()[-6:]] == ["no module named torch"] * 6
