"""What is here: versions, devices, and every operator's implementations."""

import os
from importlib import import_module

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import ops
from ..ops import cuda_library, native_library, triton_runtime, tuned
from ..ops.registry import packages
from ..perf.measure import cpu_model, gpus, versions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def show(console: Console):
    console.print(_versions())
    console.print(_devices())
    console.print(_launch_options())
    for package in packages():
        console.print(_implementations(package))


def _versions() -> Table:
    table = Table("package", "version", title="Versions", title_justify="left")
    for row in versions().items():
        table.add_row(*row)
    for what, reason in (("C++ kernels", native_library.problem()), ("CUDA kernels", cuda_library.problem())):
        table.add_row(what, "built" if reason is None else escape(reason))
    return table


def _devices() -> Table:
    table = Table("device", "what", title="Devices", title_justify="left")
    table.add_row("cpu", f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for what in gpus() or ["none that torch sees"]:
        table.add_row("gpu", what)
    return table


def _launch_options() -> Table:
    table = Table("operator", "launch options", title="Triton kernels on the current GPU", title_justify="left")
    launches = torch.cuda.is_available() and triton_runtime.INSTALLED
    for row in launch_options(torch.device("cuda", torch.cuda.current_device()) if launches else None).items():
        table.add_row(*row)
    return table


def launch_options(device: torch.device | None) -> dict[str, str]:
    """operator -> whether its launches on a device take the shipped options or, for so many rows of its tables, tuned ones."""
    entries, otherwise = [], "shipped"
    if not tuned.enabled():
        otherwise = "shipped, because PEFT_KERNELS_TUNED is 0"
    elif device is not None:
        path = tuned.cache_file(device)
        try:
            entries = tuned.read(path, device)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            otherwise = f"shipped, [yellow]because the tuned ones cannot be used[/yellow]: {escape(str(error))}"
    found = dict.fromkeys(tuned.kernels(), otherwise)
    for operator in tuned.kernels():
        if dates := [entry.date for entry in entries if entry.site.operator == operator]:
            found[operator] = f"[green]tuned[/green] on {max(dates)[:10]}, rows: {len(dates)}, {escape(str(path))}"
    return found


def _implementations(package: str) -> Table:
    title = f"{', '.join(packages()[package])}: available here, or why not"
    table = Table("impl", *device_types(), title=title, title_justify="left", show_lines=True)
    for impl, cells in availability(package).items():
        table.add_row(impl, *(_cell(reasons) for reasons in cells.values()))
    return table


def device_types() -> list[str]:
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def availability(package: str) -> dict[str, dict[str, dict[torch.dtype, str | None]]]:
    """implementation -> device type -> dtype -> why it cannot run here, None where it can."""
    implementations = import_module(f"{ops.__name__}.{package}").implementations
    return {
        impl: {device: {dtype: _reason(implementations, impl, device, dtype) for dtype in DTYPES} for device in device_types()}
        for impl in implementations.names
    }


def _reason(implementations, impl: str, device: str, dtype: torch.dtype) -> str | None:
    try:
        return implementations.unavailable(impl, device, dtype)
    except ImportError as error:
        return str(error)


def _cell(reasons: dict[torch.dtype, str | None]) -> str:
    """One line per answer; the dtypes are named only where they differ."""
    by_answer: dict[str | None, list[str]] = {}
    for dtype, reason in reasons.items():
        by_answer.setdefault(reason, []).append(str(dtype).removeprefix("torch."))
    lines = []
    for reason, dtypes in by_answer.items():
        answer = "[green]yes[/green]" if reason is None else f"[yellow]no[/yellow]: {escape(reason)}"
        lines.append(answer if len(by_answer) == 1 else f"{', '.join(dtypes)}: {answer}")
    return "\n".join(lines)
