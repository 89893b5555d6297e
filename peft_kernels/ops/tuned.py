"""Launch options that ``peft-kernels tune`` found faster on this GPU: read once, at the first launch there, then a look in a dictionary.

A cache that cannot be used is named in a warning, and the shipped tables are used: no training run ends on it.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..version import __version__

SCHEMA = 1
WARPS, STAGES = (1, 16), (1, 5)


class Kernel(NamedTuple):
    """What its shipped table is keyed by, and the least and the most of every block size that may differ from it."""

    key: tuple[str, ...]
    blocks: dict[str, tuple[int, int]]
    tiles: int = 1  # of its largest, in registers at once


@cache
def kernels() -> dict[str, dict[str, Kernel]]:
    """Package of operators -> its kernels that may be tuned: ``KERNELS`` of its module ``tunable``.

    A key's ``bytes`` is the size of an element; its other sizes are those of the row in the table of default configs.
    """
    from .registry import declared

    return {package: module.KERNELS for package, module in declared("tunable").items()}


class Site(NamedTuple):
    """A row of a shipped table: the sizes of ``key`` are named by ``Kernel.key``."""

    operator: str
    kernel: str
    key: tuple[int, ...]


class Entry(NamedTuple):
    """What takes the place of the shipped options at ``site``: block sizes, ``num_warps``, ``num_stages``. Times are seconds."""

    site: Site
    options: dict[str, int]
    shipped_s: float
    tuned_s: float
    date: str  # ISO 8601, UTC


def options(operator: str, kernel: str, device: torch.device, shipped: dict, *key: int) -> dict:
    """What to launch with: ``shipped``, and in their place the options that were found for ``key`` on this device."""
    found = entries(device).get((operator, kernel, key))
    return {**shipped, **found} if found else shipped


@cache
def entries(device: torch.device) -> dict[Site, dict[str, int]]:
    """Of the device's cache, or none: the dictionary that every launch looks into, and that the tuner puts its candidates into."""
    if not enabled():
        return {}
    path = cache_file(device)
    try:
        return {entry.site: entry.options for entry in read(path, device)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"peft_kernels uses its shipped launch configurations, because its cache of tuned ones cannot be used: {error}."
            " Run `peft-kernels tune` again, or set PEFT_KERNELS_TUNED=0.",
            stacklevel=2,
        )
        return {}


def enabled() -> bool:
    return os.environ.get("PEFT_KERNELS_TUNED") != "0"


def cache_file(device: torch.device) -> Path:
    """``$PEFT_KERNELS_CACHE``, or ``peft_kernels`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``; named by GPU and version of Triton."""
    folder = os.environ.get("PEFT_KERNELS_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "peft_kernels"
    made_for = fingerprint(device)
    name = re.sub("[^a-z0-9]+", "-", made_for["device"].lower()).strip("-")
    return Path(folder) / f"{name}-triton-{made_for['triton']}.json"


def fingerprint(device: torch.device) -> dict[str, str | int]:
    """What a cache has to agree in with what runs."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"schema": SCHEMA, "device": name, "triton": ".".join(triton.__version__.split(".")[:2]), "peft_kernels": __version__}


def read(path: Path, device: torch.device) -> list[Entry]:
    """
    Raises:
        OSError: a file that cannot be read; FileNotFoundError where there is none.
        ValueError: one that is damaged, or made for something else than what runs here.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError(f"{path}: expected an object with a list of entries")
    for what, here in fingerprint(device).items():
        if content.get(what) != here:
            raise ValueError(f"{path} is for {what} {content.get(what)!r}, and this is {here!r}")
    try:
        return [_entry(item) for item in content["entries"]]
    except Exception as error:  # whatever stands there
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def write(path: Path, device: torch.device, found: Iterable[Entry]):
    """Whole or not at all: a process that reads meanwhile finds the old file or the new one."""
    items = [{**entry._asdict(), "site": _named(entry.site)} for entry in sorted(found, key=lambda entry: entry.site)]
    head = json.dumps(fingerprint(device), indent=1)[:-2]
    lines = ",\n".join(f"  {json.dumps({**item.pop('site'), **item})}" for item in items)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(f'{head},\n "entries": [\n{lines}\n ]\n}}\n', encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _named(site: Site) -> dict:
    return {**site._asdict(), "key": dict(zip(kernels()[site.operator][site.kernel].key, site.key))}


def _entry(item: dict) -> Entry:
    operator, name = item["operator"], item["kernel"]
    if name not in kernels().get(operator, ()):
        raise ValueError(f"no kernel {name!r} of {operator!r} can be tuned")
    kernel = kernels()[operator][name]
    if tuple(item["key"]) != kernel.key or not all(type(size) is int for size in item["key"].values()):
        raise ValueError(f"{operator}, {name}: expected a key of {kernel.key}, integers, got {item['key']!r}")
    allowed = {**kernel.blocks, "num_warps": WARPS, "num_stages": STAGES}
    for what, value in item["options"].items():
        least, most = allowed.get(what, (0, 0))
        power = what == "num_stages" or (isinstance(value, int) and value & (value - 1) == 0)
        if type(value) is not int or not least <= value <= most or not power:
            raise ValueError(f"{operator}, {name}: {what}={value!r} is no option, which are {allowed}, powers of two but for stages")
    times = float(item["shipped_s"]), float(item["tuned_s"])
    return Entry(Site(operator, name, tuple(item["key"].values())), item["options"], *times, str(item["date"]))
