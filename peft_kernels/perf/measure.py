"""Timing: runs interleaved in one process, medians with their spread, and the measured peaks of the same machine in the
same run.
"""

import ctypes
import gc
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from .. import __version__
from ..ops import tuned

PACKAGES = ("torch", "transformers", "peft", "triton")
COPY_BYTES = 1 << 28  # larger than every cache
L2_FLUSH_BYTES = 1 << 28


@dataclass(frozen=True)
class Timing:
    """Seconds of every run of one function."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float | None:
        """Interquartile range over the median; None for a single run."""
        if len(self.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median

    def to_json(self) -> dict:
        return {
            "median_s": self.median,
            "spread": self.spread,
            "runs": len(self.seconds),
            "seconds": list(self.seconds),
        }


@runtime_checkable
class SelfTimed(Protocol):
    """A function that runs in another process: timing its call here would include the communication."""

    def __call__(self) -> Any: ...

    def seconds(self) -> float:
        """Run twice and return the seconds of the second run, measured in the other process."""
        ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C between timed runs; ``timings`` covers the turns so far and is empty unless every function had one."""

    def __init__(self, timings: Mapping[str, Timing]):
        self.timings = timings if all(timing.seconds for timing in timings.values()) else {}


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int | Mapping[str, int],
    *,
    warmup: int = 1,
    device: str = "cpu",
    notify: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Time every function ``repeats`` times, turn by turn, so that drifts of the machine's speed affect all of them
    alike.

    ``repeats`` may differ by name; slow functions then skip the later turns.

    The order changes every turn, so that no function always runs after the same one, which leaves caches cold or warm
    for it. On CUDA the L2 cache is flushed before each run and events are timed. ``notify`` gets the name before each
    timed run.

    A ``SelfTimed`` function runs in another process, whose caches are in a different state. If there is one among the
    functions, every timed run directly follows an untimed one of the same function.

    Raises:
        Interrupted: on KeyboardInterrupt in a timed run.
    """
    wanted = repeats if isinstance(repeats, Mapping) else dict.fromkeys(functions, repeats)
    clock = clock_of(device)
    settle = any(isinstance(function, SelfTimed) for function in functions.values())

    def timed(function) -> float:
        if isinstance(function, SelfTimed):
            return function.seconds()
        if settle:
            function()
        return clock(function)

    for _ in range(warmup):
        for function in functions.values():
            function()
    samples = {name: [] for name in functions}
    order = random.Random(0)
    try:
        for turn in range(max(wanted.values())):
            for name in order.sample(list(functions), len(functions)):
                if turn < wanted[name]:
                    notify(name)
                    samples[name].append(timed(functions[name]))
    except KeyboardInterrupt:
        raise Interrupted(_timings(samples)) from None
    return _timings(samples)


def _timings(samples: Mapping[str, list[float]]) -> dict[str, Timing]:
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def clock_of(device: str) -> Callable[[Callable[[], Any]], float]:
    """A clock: runs a function and returns its seconds."""
    return _cuda_clock() if device == "cuda" else _wall_clock


def _wall_clock(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_clock():
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def clock(function) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """Capture ``function`` as a CUDA graph: replaying it times the kernels without Python and launch overhead."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    # the default argument keeps the function alive, and with it the tensors that the graph reads
    def replay(
        function=function,
    ):
        graph.replay()

    return replay


def peak_memory(function: Callable[[], Any], device: str = "cpu") -> tuple[Any, int | None, float]:
    """Run once; returns the result, by how many bytes memory rose above its level before the run, and the seconds it
    took.

    On a CPU the kernel keeps the high-water mark of resident memory (``VmHWM``). It is reset before the run, after free
    memory has been returned to the system; so no peak is missed, and memory that the allocator holds counts. None if
    the system has no such mark (only Linux has).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before, time.perf_counter() - start
    before = _reset_high_water()
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    return result, None if before is None else _resident("VmHWM") - before, seconds


def _reset_high_water() -> int | None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@dataclass(frozen=True)
class Peaks:
    """The measured peaks of this machine in this run; the roofline bound of a call is the larger of bytes / bandwidth
    and operations / rate.
    """

    bandwidth: float  # bytes per second of a copy, reads and writes counted
    rate: float  # operations per second of a large matmul; a multiply-add counts as two

    def roofline(self, nbytes: float, operations: float) -> float:
        return max(nbytes / self.bandwidth, operations / self.rate)

    def __str__(self):
        return f"copy {self.bandwidth / 1e9:.1f} GB/s, matmul {self.rate / 1e9:,.0f} GFLOP/s"


def peaks(dtype: torch.dtype, device: str = "cpu", *, quick: bool = False) -> Peaks:
    return Peaks(
        copy_bandwidth(device, COPY_BYTES >> (5 if quick else 0)), matrix_rate(dtype, device, 256 if quick else None)
    )


def copy_bandwidth(device: str = "cpu", nbytes: int = COPY_BYTES) -> float:
    source, target = (torch.ones(nbytes, dtype=torch.int8, device=device) for _ in range(2))
    return 2 * nbytes / interleaved({"copy": lambda: target.copy_(source)}, 7, device=device)["copy"].median


def matrix_rate(dtype: torch.dtype, device: str = "cpu", size: int | None = None) -> float:
    """Rate of the faster library if there are two: on a CPU, plain matmuls and oneDNN on packed weights may differ."""
    size = size or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    matmuls = {"plain": lambda: torch.mm(a, b, out=out)}
    if device == "cpu" and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16):
        packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
        matmuls["packed"] = lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
    return 2 * size**3 / min(timing.median for timing in interleaved(matmuls, 7, device=device).values())


def versions() -> dict[str, str]:
    by_package = {"peft_kernels": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            by_package[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            by_package[name] = "not installed"
    return by_package


def cpu_model() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    kind = "ROCm" if torch.version.hip else "CUDA"
    names = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        arch = p.gcnArchName if torch.version.hip else f"sm_{p.major}{p.minor}"
        names.append(f"{kind} {i}: {p.name}, {arch}, {p.total_memory / 2**30:.0f} GiB")
    return names


def environment() -> dict:
    """The fingerprint of the machine and its software that goes with every measurement."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
        "tuned": len(tuned.entries(torch.device("cuda")))
        if torch.cuda.is_available()
        else 0,  # configs that differ from the default ones
    }
