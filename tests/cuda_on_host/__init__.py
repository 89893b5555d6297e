"""The CUDA C++ kernels compiled by g++ and run on the CPU, for the tests of machines without a GPU.

The sources in csrc/cuda are compiled against include/ instead of CUDA, with the device.cuh of this folder in place of
theirs. Every CUDA thread is a fiber (block.cpp). The library registers the operators for CPU tensors.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

from peft_kernels.ops import native_library

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc" / "cuda"
ORDERS = ("ascending", "descending", "shuffled")
CHECKS = {
    "races": ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"],  # calls the functions in races.cpp
    "sanitizers": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
# -w: host code ignores #pragma unroll; -fno-strict-aliasing: as nvcc compiles device code
FLAGS = ["-O1", "-g1", "-w", "-std=c++20", "-fPIC", "-fno-strict-aliasing", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
SHARED = re.compile(r"__shared__\s+(?:alignas\((\d+)\)\s+)?(\w+)\s+([^;]+);")


def unavailable() -> str | None:
    """Returns why the kernels cannot be compiled or run here, or None."""
    if platform.machine() != "x86_64":
        return f"block.cpp switches between fibers of x86_64, not of {platform.machine()}"
    if shutil.which("g++") is None:
        return "there is no g++"
    return native_library.load_error()


def implementation(module: ModuleType, device: torch.device, monkeypatch) -> ModuleType:
    """Returns an operator's CUDA implementation; on a CPU with the kernels of this library, run in every order."""
    if reason := unavailable() if device.type == "cpu" else module.unavailable(device.type, torch.float32):
        pytest.skip(reason)
    if device.type == "cpu":
        library()
        monkeypatch.setattr(module, "unavailable", lambda device, dtype: None)
        for name in set(module.__all__) - {"unavailable"}:
            monkeypatch.setattr(module, name, in_every_order(getattr(module, name)))
    return module


def in_every_order(function: Callable) -> Callable:
    """Returns ``function`` with blocks and threads run in every order; the results must be bit-equal.

    A function whose name ends with an underscore changes its first argument.
    """

    def call(*args, **kwargs):
        in_place = function.__name__.endswith("_")
        before = args[0].clone() if in_place else None
        results = []
        for order in range(len(ORDERS)):
            if in_place:
                args[0].copy_(before)
            library().cuda_on_host_order(order)
            result = function(*args, **kwargs)
            tensors = (
                [args[0]] if in_place else [x for x in result if x is not None] if type(result) is tuple else [result]
            )
            results.append([x.contiguous().view(torch.uint8).clone() for x in tensors])
        library().cuda_on_host_order(0)
        for order, other in zip(ORDERS, results):
            same = all(map(torch.equal, other, results[0]))
            assert same, f"{function.__name__}: blocks and threads in {order} order change the result"
        return result

    return call


@cache
def library() -> ctypes.CDLL:
    """Returns the library, loaded. It is compiled once for each state of its sources.

    The environment variable CUDA_ON_HOST names the checks, CUDA_ON_HOST_KERNELS the folder of the kernels.
    """
    checks = os.environ.get("CUDA_ON_HOST", "races")
    kernels = Path(os.environ.get("CUDA_ON_HOST_KERNELS", KERNELS))
    state = hashlib.sha256(repr((torch.__version__, FLAGS, CHECKS)).encode())
    for path in sorted((*kernels.glob("*.cu*"), *HERE.rglob("*.h"), *HERE.glob("*.c*"))):
        state.update(path.read_bytes())
    builds = ROOT / "build" / "cuda_on_host" if kernels == KERNELS else kernels / "build"
    folder = builds / f"{checks}-{state.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "library.so").exists():
            for stale in set(builds.glob(f"{checks}-*")) - {folder}:
                shutil.rmtree(stale, ignore_errors=True)
            build(folder, kernels, checks)
    torch.ops.load_library(folder / "library.so")
    return ctypes.CDLL(str(folder / "library.so"))


def build(folder: Path, kernels: Path, checks: str) -> None:
    """Compiles ``kernels`` into library.so in ``folder``."""
    for path in (*kernels.glob("*.cuh"), *kernels.glob("*.cu"), HERE / "device.cuh"):  # ours last
        (folder / path.name).write_text(f'#line 1 "{path}"\n' + with_shared_memory(path.read_text()))
    sources = [HERE / "block.cpp", HERE / "races.cpp", *set(folder.glob("*.cu")) - {folder / "device.cu"}]
    includes = [f"-I{path}" for path in (HERE / "include", *include_paths())]

    def compiled(source):
        options = ["-include", "cuda_runtime.h", "-x", "c++", *CHECKS[checks]] if source.suffix == ".cu" else ["-O2"]
        run_compiler(*options, *includes, "-c", source, "-o", folder / f"{source.stem}.o")
        return folder / f"{source.stem}.o"

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    link = ["-shared", *(CHECKS[checks] if checks == "sanitizers" else [])]
    run_compiler(
        *link, *objects, *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ldl", "-o", folder / "linked"
    )
    (folder / "linked").rename(folder / "library.so")


def with_shared_memory(source: str) -> str:
    """Returns a source in which every __shared__ variable is a reference to memory of its block."""

    def references(match):
        alignment, element, declarators = match.groups()
        arrays = (re.match(r"\s*(\w+)(.*)", declarator, re.DOTALL).groups() for declarator in declarators.split(","))
        reference = "auto& {0} = cuda_on_host::shared<{2}{1}, {3}>([] {{}});"
        return " ".join(reference.format(name, sizes, element, alignment or 1) for name, sizes in arrays)

    return SHARED.sub(references, source)


def run_compiler(*arguments) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = ["g++", *FLAGS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def run_tests(*arguments: str, checks: str, kernels: Path = KERNELS) -> subprocess.CompletedProcess:
    """Runs tests in a process of their own, until one fails, with ``kernels`` compiled with ``checks``."""
    environment = os.environ | {"CUDA_ON_HOST": checks, "CUDA_ON_HOST_KERNELS": str(kernels)}
    if checks == "sanitizers":
        names = [f"-print-file-name={name}.so" for name in ("libasan", "libubsan")]
        libraries = [subprocess.check_output(["g++", name], text=True).strip() for name in names]
        environment |= {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    # a sanitizer ends the process, so its report is not captured in it
    options = ["-x", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
