"""CUDA C++ kernels compiled by g++ and run on the CPU, for the tests of machines without a GPU.

The sources of csrc/cuda are compiled with this folder's device.cuh in place of theirs, against include/ instead of CUDA. Every CUDA thread
is a fiber (block.cpp). The library registers the operators for CPU tensors.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

from peft_kernels.ops import native_library

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc" / "cuda"
ORDERS = ("ascending", "descending", "shuffled")
# what the kernels are compiled with, by CUDA_ON_HOST: the detection of races is ours, the sanitizers are loaded with LD_PRELOAD
CHECKS = {
    "races": ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"],
    "sanitizers": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
FLAGS = ["-O1", "-g1", "-std=c++20", "-fPIC", "-fno-strict-aliasing", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-w"]
SHARED = re.compile(r"__shared__\s+(?:alignas\((\d+)\)\s+)?(\w+)\s+([^;]+);")


def unavailable() -> str | None:
    """Returns why the kernels cannot be compiled or run here, or None."""
    if platform.machine() != "x86_64":
        return f"block.cpp switches fibers on x86_64, not on {platform.machine()}"
    if shutil.which("g++") is None:
        return "there is no g++"
    return native_library.problem()


def translated(source: str) -> str:
    """Returns a source in which every __shared__ variable is a reference to memory of the block."""

    def references(match):
        alignment, element, declarators = match.groups()
        arrays = (re.match(r"\s*(\w+)(.*)", declarator, re.DOTALL).groups() for declarator in declarators.split(","))
        return " ".join(
            f"auto& {name} = cuda_on_host::shared<{element}{sizes}, {alignment or 1}>([] {{}});"
            for name, sizes in arrays
        )

    return SHARED.sub(references, source)


def build(folder: Path, kernels: Path = KERNELS, checks: str = "races") -> Path:
    """Compiles the kernels in ``kernels`` into a library in ``folder``, and returns it."""
    for path in (*kernels.glob("*.cuh"), *kernels.glob("*.cu"), HERE / "device.cuh"):  # ours last
        (folder / path.name).write_text(f'#line 1 "{path}"\n' + translated(path.read_text()))
    sources = [
        HERE / "block.cpp",
        HERE / "races.cpp",
        *(path for path in folder.glob("*.cu") if path.name != "device.cu"),
    ]
    includes = [f"-I{path}" for path in (HERE / "include", *include_paths())]

    def compiled(source):
        flags = ["-include", "cuda_runtime.h", "-x", "c++", *CHECKS[checks]] if source.suffix == ".cu" else ["-O2"]
        target = folder / f"{source.stem}.o"
        run("g++", *FLAGS, *includes, *flags, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    sanitizers = CHECKS[checks] if checks == "sanitizers" else []
    run(
        "g++",
        "-shared",
        *sanitizers,
        *objects,
        *(f"-L{path}" for path in library_paths()),
        "-ltorch_cpu",
        "-ldl",
        "-o",
        folder / "library.so",
    )
    return folder / "library.so"


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"


@cache
def library() -> ctypes.CDLL:
    """Returns the library, loaded; it is compiled once for each state of the sources."""
    checks = os.environ.get("CUDA_ON_HOST", "races")
    state = hashlib.sha256(repr((torch.__version__, FLAGS, CHECKS)).encode())
    for path in sorted(
        (*KERNELS.iterdir(), *(path for path in HERE.rglob("*") if path.is_file() and path.suffix != ".pyc"))
    ):
        state.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_on_host" / f"{checks}-{state.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "library.so").exists():
            build(folder, checks=checks)
    torch.ops.load_library(folder / "library.so")
    return ctypes.CDLL(str(folder / "library.so"))


def implementation(module, device: torch.device, monkeypatch):
    """Returns an operator's CUDA implementation as it is on a GPU; on a CPU its kernels are those of this library, run in every order."""
    if reason := module.unavailable(device.type, torch.float32) if device.type == "cuda" else unavailable():
        pytest.skip(reason)
    if device.type == "cpu":
        library()
        monkeypatch.setattr(module, "unavailable", lambda device, dtype: None)
        for name in set(module.__all__) - {"unavailable"}:
            monkeypatch.setattr(module, name, in_every_order(getattr(module, name)))
    return module


def in_every_order(function):
    """Returns ``function`` with its kernels' blocks and threads run in every order; the results must be bit-equal.

    A function whose name ends with an underscore changes its first argument.
    """

    def call(*args, **kwargs):
        before = args[0].clone() if function.__name__.endswith("_") else None
        first = None
        for order in ORDERS:
            if before is not None:
                args[0].copy_(before)
            library().cuda_on_host_order(ORDERS.index(order))
            result = function(*args, **kwargs)
            results = [x.clone() for x in tensors_of(args[0] if result is None else result)]
            if first is None:
                first = results
            assert all(map(same_bits, results, first)), (
                f"{function.__name__}: blocks and threads in {order} order change the result"
            )
        library().cuda_on_host_order(0)
        return result

    return call


def tensors_of(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
