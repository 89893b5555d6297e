"""Versions, devices, and one matrix of operators against implementations, with a footnote for each reason."""

import os
from importlib import import_module
from itertools import zip_longest

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import ops
from ..ops import cuda_library, native_library, triton_runtime, tuned
from ..ops.registry import packages
from ..perf.measure import cpu_model, gpus, versions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDER = ("reference", "explicit", "sdpa", "matmul", "cpp", "cuda", "triton")


def show(console: Console):
    """Print the overview on one screen of 80 columns and 40 lines."""
    footnotes: dict[str, int] = {}
    console.print(_facts(footnotes))
    console.print(_matrix(footnotes))
    notes = Table.grid(padding=(0, 1))
    for reason, number in footnotes.items():
        notes.add_row(f"[yellow]{number}[/yellow]", escape(reason))
    console.print(notes)


def _facts(footnotes: dict[str, int]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    table.add_row("versions", ", ".join(f"{package} {version}" for package, version in versions().items()))
    problems = {"C++ kernels": native_library.load_error(), "CUDA kernels": cuda_library.error()}
    built = {
        name: "built" if reason is None else f"[yellow]no[/yellow] {_number(reason, footnotes)}"
        for name, reason in problems.items()
    }
    table.add_row("libraries", ", ".join(f"{name}: {answer}" for name, answer in built.items()))
    table.add_row(
        "cpu",
        f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,"
        f" {torch.backends.cpu.get_cpu_capability()}",
    )
    for gpu in gpus() or ["none that torch sees"]:
        table.add_row("gpu", gpu)
    launches = torch.cuda.is_available() and triton_runtime.INSTALLED
    operators: dict[str, list[str]] = {}
    for operator, config in launch_configs(
        torch.device("cuda", torch.cuda.current_device()) if launches else None
    ).items():
        operators.setdefault(config, []).append(operator)
    *fewer, most = sorted(operators, key=lambda config: len(operators[config])) or [None]
    for config in fewer:
        table.add_row("launch configs", f"{', '.join(operators[config])}: {config}")
    if most is not None:
        table.add_row("launch configs", f"all others: {most}" if fewer else most)
    return table


def launch_configs(device: torch.device | None) -> dict[str, str]:
    """operator -> where its launches on this GPU take their configs: the default ones, or tuned ones and for how many
    rows. Empty without a GPU.
    """
    if device is None:
        return {}
    entries, otherwise = [], "default"
    if not tuned.enabled():
        otherwise = "default, because PEFT_KERNELS_TUNED is 0"
    else:
        path = tuned.cache_file(device)
        try:
            entries = tuned.read(path, device)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            otherwise = f"default, [yellow]because the tuned ones cannot be used[/yellow]: {escape(str(error))}"
    configs = dict.fromkeys(tuned.kernels(), otherwise)
    for operator in tuned.kernels():
        if dates := [entry.date for entry in entries if entry.site.operator == operator]:
            configs[operator] = f"[green]tuned[/green] on {max(dates)[:10]}, rows: {len(dates)}, {escape(str(path))}"
    return configs


def device_types() -> list[str]:
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def availability(package: str) -> dict[str, dict[str, dict[torch.dtype, str | None]]]:
    """implementation -> device type -> dtype -> why it cannot run here, None if it can."""
    implementations = import_module(f"{ops.__name__}.{package}").implementations
    return {
        impl: {
            device: {dtype: _reason(implementations, impl, device, dtype) for dtype in DTYPES}
            for device in device_types()
        }
        for impl in implementations.names
    }


def _reason(implementations, impl: str, device: str, dtype: torch.dtype) -> str | None:
    try:
        return implementations.unavailable(impl, device, dtype)
    except ImportError as error:
        return str(error)


def _matrix(footnotes: dict[str, int]) -> Table:
    """A line for each operator and each device of a package of implementations; ``footnotes`` collects the reasons and
    numbers them.
    """
    rows = {package: availability(package) for package in packages()}
    names = sorted({impl for row in rows.values() for impl in row}, key=ORDER.index)
    devices = ["gpu" if device == "cuda" else device for device in device_types()]
    title = f"\nImplementations on {' and '.join(devices)} ({', '.join(map(_name, DTYPES))}; numbers: footnotes)"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("operator", no_wrap=True, min_width=max(map(len, ops.__all__)))
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, overflow="fold")
    for package, row in rows.items():
        cells = [
            [_cell(reasons, footnotes) for reasons in row[impl].values()] if impl in row else ["-"] * len(devices)
            for impl in names
        ]
        for line in zip_longest(packages()[package], devices, *cells, fillvalue=""):
            table.add_row(*line)
    return table


def _cell(reasons: dict[torch.dtype, str | None], footnotes: dict[str, int]) -> str:
    """Whether any dtype runs, and the footnote numbers of the reasons why others do not."""
    dtypes_of: dict[str, list[torch.dtype]] = {}  # reason with a placeholder for the dtype -> dtypes
    for dtype, reason in reasons.items():
        if reason is not None:
            dtypes_of.setdefault(reason.replace(str(dtype), "{}"), []).append(dtype)
    runs = None in reasons.values()
    numbers = [_number(_footnote(reason, dtypes, runs), footnotes) for reason, dtypes in dtypes_of.items()]
    answer = "[green]yes[/green]" if runs else "[yellow]no[/yellow]"
    return f"{answer} {','.join(map(str, numbers))}" if numbers else answer


def _number(reason: str, footnotes: dict[str, int]) -> int:
    return footnotes.setdefault(reason, len(footnotes) + 1)


def _footnote(reason: str, dtypes: list[torch.dtype], others_run: bool) -> str:
    """The reason with the dtypes in its placeholder, or in front of a reason that has none."""
    names = " and ".join(map(str, dtypes))
    if "{}" in reason:
        return reason.replace("{}", names)
    return f"{names}: {reason}" if others_run else reason


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
