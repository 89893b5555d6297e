"""Result files: one row for each candidate of a benchmark case, with the machine that it was measured on."""

import csv
import json
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from .measure import Peaks, Timing, cpu_model, environment

OURS = "ours"
SCHEMA = 2
# the facts that a report shows of a machine
ENVIRONMENT = {
    "cores",
    "cpu",
    "cpu_capability",
    "date",
    "gpus",
    "system",
    "threads",
    "versions",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate on one benchmark case.

    Rows that agree in all of ``case`` were timed turn by turn in one process.
    """

    benchmark: str  # an operator's name, or an end-to-end benchmark's
    shape: dict[str, int]  # the letters of the operator's docstring -> sizes
    variant: str = ""  # further properties of the problem: "ragged", "16 adapters"
    dtype: str
    phase: str  # "forward", "forward + backward", "generate", "training step"
    candidate: str  # OURS, an implementation of ours, or a baseline
    median_s: float | None = None
    spread: float | None = None  # interquartile range over the median
    runs: int = 0
    ratio: float | None = None  # the candidate's time over ours: the median of the turns' ratios
    error: float | None = (
        None  # norm of the error over norm of the float64 truth; for tokens, the share of streams that differ
    )
    bytes: int | None = None  # each input read once, each output written once
    operations: int | None = None  # a multiply-add counts as two
    roofline_s: float | None = (
        None  # the larger of bytes over the measured bandwidth and operations over the measured rate
    )
    peak_bytes: int | None = None  # above the level before the run
    kept_bytes: int | None = None  # held between steps: cross-attention's keys and values
    items: int | None = None  # number of items that a run processes
    item: str = ""  # "tokens", "samples"
    missing: str | None = None  # why it was not timed

    @property
    def case(self) -> tuple:
        return self.benchmark, tuple(self.shape.items()), self.variant, self.dtype, self.phase

    @property
    def share_of_roofline(self) -> float | None:
        return None if self.roofline_s is None or self.median_s is None else self.roofline_s / self.median_s


def compared(timings: Mapping[str, Timing], by_candidate: Mapping[str, Mapping] = {}, **common) -> list[Row]:
    """A row for each candidate that was timed, turn by turn. ``by_candidate``: candidate -> its own fields;
    ``common``: fields that all rows share.

    Without OURS among the candidates there are no ratios.
    """
    ours = timings[OURS].seconds if OURS in timings else ()

    def row(candidate: str, timing: Timing) -> Row:
        ratios = [theirs / own for theirs, own in zip(timing.seconds, ours)]  # zip: a slow candidate has fewer turns
        times = {"median_s": timing.median, "spread": timing.spread, "runs": len(timing.seconds)}
        times["ratio"] = statistics.median(ratios) if ratios else None
        return Row(**{"candidate": candidate, **times, **common, **by_candidate.get(candidate, {})})

    return [row(candidate, timing) for candidate, timing in timings.items()]


@dataclass(frozen=True)
class Results:
    """The content of a file: device, peaks by dtype, and rows."""

    device: str  # "cpu" or "cuda"
    device_name: str
    environment: dict
    rows: tuple[Row, ...]
    peaks: dict[str, Peaks] = field(default_factory=dict)  # dtype -> measured peaks of the same run
    command: str = ""
    partial: bool = False  # the run was interrupted; the file holds what it measured until then

    def by_case(self) -> dict[tuple, list[Row]]:
        """Rows that were timed together, in the file's order."""
        cases = {}
        for row in self.rows:
            cases.setdefault(row.case, []).append(row)
        return cases

    def write(self, path: Path) -> Path:
        """Write JSON to ``path`` and the same rows as CSV beside it. Partial results go to a file beside complete ones
        and do not replace them.

        Returns:
            The path of the JSON file.
        """
        if self.partial:
            path = partial_path(path)
        else:
            for name in (partial_path(path), partial_path(path).with_suffix(".csv")):
                name.unlink(missing_ok=True)
        content = {key: value for key, value in asdict(self).items() if key != "rows" and (key != "partial" or value)}
        head = json.dumps({"schema": SCHEMA, **content}, indent=1)
        rows = ",\n".join(f"  {json.dumps(_without_defaults(row))}" for row in self.rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [column.name for column in fields(Row)])
            writer.writeheader()
            writer.writerows(
                {**asdict(row), "shape": " ".join(f"{k}={v}" for k, v in row.shape.items())} for row in self.rows
            )
        return path


def first_line(error: Exception) -> str:
    """The reason for the row of a candidate that has no time."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def partial_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def write_json(path: Path, partial: bool, **content) -> Path:
    """Write the results of a run that has no rows.

    Returns the path, which is beside ``path`` if the run was interrupted.
    """
    if partial:
        path, content = partial_path(path), {"partial": True, **content}
    else:
        partial_path(path).unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n")
    return path


def measured(rows: Iterable[Row], device: str, peaks: Mapping[str, Peaks] = {}, partial: bool = False) -> Results:
    """Rows of this process with this machine's fingerprint, and the command without its output path."""
    command = re.sub(r" --out[ =]\S+", "", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    return Results(device, device_name(device), environment(), tuple(rows), dict(peaks), command, partial)


def read(path: Path) -> Results:
    """Read a result file.

    Raises:
        ValueError: the file does not have this schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        schema = content.get("schema") if isinstance(content, dict) else None
        raise ValueError(f"{path}: expected results of schema {SCHEMA}, got {schema!r}")
    del content["schema"]
    try:
        content["rows"] = tuple(Row(**row) for row in content["rows"])
        content["peaks"] = {dtype: Peaks(**peaks) for dtype, peaks in content["peaks"].items()}
        missing = ENVIRONMENT - set(content["environment"])
        results = Results(**content)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected results of schema {SCHEMA}, got {type(error).__name__}: {error}") from error
    if missing:
        raise ValueError(
            f"{path}: expected results of schema {SCHEMA}, whose environment has {', '.join(sorted(missing))}"
        )
    return results


def default_folder(device: str) -> Path:
    """The folder for the results of this machine."""
    return Path("results") / folder_name(device_name(device))


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_model()


def folder_name(device_name: str) -> str:
    """A device's name as a folder: lower case, words joined by dashes, without trademarks and clock rates."""
    words = re.sub(r"\((?:R|TM|C)\)|@.*|\b\d+-Core\b|\bProcessor\b|\bCPU\b", " ", device_name, flags=re.I)
    return "-".join(re.findall(r"[a-z0-9]+", words.lower())) or "unknown"


def _without_defaults(row: Row) -> dict:
    return {column.name: value for column in fields(Row) if (value := getattr(row, column.name)) != column.default}
