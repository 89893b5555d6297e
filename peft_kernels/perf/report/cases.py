"""Result files as the report shows them: the cases of every machine, and how the candidates of each case compare."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..measure import Peaks
from ..results import OURS, Results, Row, read
from .sections import Section, section


@dataclass(frozen=True)
class CaseResult:
    """One case on one machine: its candidates, timed turn by turn, and the file that they come from."""

    rows: tuple[Row, ...]
    results: Results
    # letters with the same size in all cases of the benchmark: they do not tell cases apart
    fixed: frozenset[str] = frozenset()

    @cached_property
    def section(self) -> Section:
        return section(self.rows[0].benchmark)

    @property
    def of(self) -> Row:
        """Any row: all agree on the case."""
        return self.rows[0]

    @property
    def timed(self) -> list[Row]:
        return [row for row in self.rows if row.missing is None]

    @property
    def missing(self) -> list[Row]:
        return [row for row in self.rows if row.missing is not None]

    @property
    def ours(self) -> Row | None:
        return next((row for row in self.timed if row.candidate == OURS), None)

    @property
    def baselines(self) -> list[Row]:
        """Candidates of others that do the same work."""
        return [
            row
            for row in self.timed
            if row.ratio is not None and not is_ours(row.candidate) and row.candidate not in self.section.other_work
        ]

    @property
    def strongest(self) -> Row | None:
        return min(self.baselines, key=lambda row: row.ratio, default=None)

    @property
    def peaks(self) -> Peaks | None:
        return self.results.peaks.get(self.of.dtype)

    @property
    def problem(self) -> str:
        """The sizes and the variant, which distinguish it from cases of the same dtype and phase."""
        sizes = " ".join(f"{letter}={size}" for letter, size in self.of.shape.items() if letter not in self.fixed)
        return ", ".join(part for part in (sizes, self.of.variant) if part)


@dataclass(frozen=True)
class Machine:
    """A device, the files that were measured on it, oldest first, and the newest result of each case."""

    device: str
    name: str
    files: tuple[tuple[Path, Results], ...]
    cases: tuple[CaseResult, ...]

    def of(self, benchmark: str) -> list[CaseResult]:
        return [case for case in self.cases if case.of.benchmark == benchmark]


def is_ours(candidate: str) -> bool:
    """Whether the candidate is ours, or another implementation or setting of ours: ``ours, cpp``."""
    return candidate == OURS or candidate.startswith(f"{OURS}, ")


def load(folders: Iterable[Path]) -> list[Machine]:
    """The machines of all JSON files in the folders, GPUs first.

    Raises:
        ValueError: a folder has no results, or a file does not have the schema.
    """
    by_machine: dict[tuple[str, str], list[tuple[Path, Results]]] = {}
    for folder in folders:
        paths = sorted(path for path in folder.rglob("*.json") if path.is_file())
        if not paths:
            raise ValueError(f"{folder}: expected result files (*.json), found none")
        for path in paths:
            results = read(path)
            by_machine.setdefault((results.device, results.device_name), []).append((path, results))
    machines = [_machine(*key, files) for key, files in by_machine.items()]
    return sorted(machines, key=lambda machine: (machine.device == "cpu", machine.name))


def _machine(device: str, name: str, files: list[tuple[Path, Results]]) -> Machine:
    files = sorted(files, key=lambda file: (file[1].environment["date"], file[0]))
    newest = {case: (tuple(rows), results) for _, results in files for case, rows in results.by_case().items()}
    shapes: dict[str, list[dict[str, int]]] = {}
    for (benchmark, *_), (rows, _) in newest.items():
        shapes.setdefault(benchmark, []).append(rows[0].shape)
    fixed = {benchmark: frozenset(_fixed(sizes)) for benchmark, sizes in shapes.items()}
    return Machine(device, name, tuple(files), tuple(CaseResult(*new, fixed[case[0]]) for case, new in newest.items()))


def _fixed(shapes: list[dict[str, int]]) -> dict[str, int]:
    """Letters with one size in all shapes; empty if all shapes are the same."""
    first = shapes[0]
    same = {letter: size for letter, size in first.items() if all(shape.get(letter) == size for shape in shapes)}
    return same if same != first else {}
