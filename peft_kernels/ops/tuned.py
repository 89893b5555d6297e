"""Launch configs that ``peft-kernels tune`` measured to be faster on this GPU: read once, at the first launch, then a
dictionary lookup per launch.

If the cache cannot be used, a warning names it and the default configs apply: a bad cache never ends a training run.
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
    """A tunable kernel: the key of its table of default configs, and the range (least, most) of every block size that
    may be tuned.
    """

    key: tuple[str, ...]
    blocks: dict[str, tuple[int, int]]
    tiles: int = 1  # how many tiles of the largest size it keeps in registers at once


@cache
def kernels() -> dict[str, dict[str, Kernel]]:
    """Returns package of operators -> its tunable kernels: ``KERNELS`` of its module ``tunable``.

    A key's ``bytes`` is the size of an element; its other sizes identify the row in the table of default configs.
    """
    from .registry import declared

    return {package: module.KERNELS for package, module in declared("tunable").items()}


class Site(NamedTuple):
    """A row of a table of default configs: ``Kernel.key`` names the sizes in ``key``."""

    operator: str
    kernel: str
    key: tuple[int, ...]


class Entry(NamedTuple):
    """Replacements for the default config at ``site``: block sizes, ``num_warps``, ``num_stages``.

    Times are in seconds.
    """

    site: Site
    options: dict[str, int]
    shipped_s: float
    tuned_s: float
    date: str  # ISO 8601, UTC


def options(operator: str, kernel: str, device: torch.device, default: dict, *key: int) -> dict:
    """Returns the config of a launch: ``default``, overridden by the tuned values for ``key`` on this device, if there
    are any.
    """
    changes = entries(device).get((operator, kernel, key))
    return {**default, **changes} if changes else default


@cache
def entries(device: torch.device) -> dict[Site, dict[str, int]]:
    """Returns the entries of the device's cache; empty without a usable one.

    Every launch looks into this dictionary, and the tuner puts its candidates into it.
    """
    if not enabled():
        return {}
    path = cache_file(device)
    try:
        return {entry.site: entry.options for entry in read(path, device)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            "peft_kernels uses its default configs, because its cache of tuned ones cannot be used:"
            f" {error}. Run `peft-kernels tune` again, or set PEFT_KERNELS_TUNED=0.",
            stacklevel=2,
        )
        return {}


def enabled() -> bool:
    return os.environ.get("PEFT_KERNELS_TUNED") != "0"


def cache_file(device: torch.device) -> Path:
    """Returns the cache file in ``$PEFT_KERNELS_CACHE``, ``$XDG_CACHE_HOME/peft_kernels`` or ``~/.cache/peft_kernels``.

    Its name contains the GPU and the version of Triton.
    """
    folder = os.environ.get("PEFT_KERNELS_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "peft_kernels"
    made_for = fingerprint(device)
    name = re.sub("[^a-z0-9]+", "-", made_for["device"].lower()).strip("-")
    return Path(folder) / f"{name}-triton-{made_for['triton']}.json"


def fingerprint(device: torch.device) -> dict[str, str | int]:
    """Returns the values that a cache must share with the running process."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "schema": SCHEMA,
        "device": name,
        "triton": ".".join(triton.__version__.split(".")[:2]),
        "peft_kernels": __version__,
    }


def read(path: Path, device: torch.device) -> list[Entry]:
    """Reads the entries of a cache file.

    Raises:
        OSError: the file cannot be read; FileNotFoundError if it does not exist.
        ValueError: the file is damaged, or was made for another device or version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError(f"{path}: expected an object with a list of entries")
    for name, here in fingerprint(device).items():
        if content.get(name) != here:
            raise ValueError(f"{path} is for {name} {content.get(name)!r}, and this is {here!r}")
    try:
        return [_entry(item) for item in content["entries"]]
    except Exception as error:  # the file may contain anything
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def write(path: Path, device: torch.device, rows: Iterable[Entry]):
    """Writes the file atomically: a concurrent reader sees either the old file or the new one."""
    items = [{**entry._asdict(), "site": _named(entry.site)} for entry in sorted(rows, key=lambda entry: entry.site)]
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
    for key, value in item["options"].items():
        least, most = allowed.get(key, (0, 0))
        power = key == "num_stages" or (isinstance(value, int) and value & (value - 1) == 0)
        if type(value) is not int or not least <= value <= most or not power:
            raise ValueError(
                f"{operator}, {name}: {key}={value!r} is no option, which are {allowed}, powers of two but for stages"
            )
    times = float(item["shipped_s"]), float(item["tuned_s"])
    return Entry(Site(operator, name, tuple(item["key"].values())), item["options"], *times, str(item["date"]))
