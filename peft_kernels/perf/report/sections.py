"""Descriptions of the benchmarks: title, meaning of the letters, and which candidates do other work."""

import re
from dataclasses import dataclass

from ... import ops
from ...ops.registry import operator


@dataclass(frozen=True)
class Section:
    """Presentation of a benchmark."""

    benchmark: str
    title: str
    about: str = ""
    published: str | None = None  # for an operator, the baseline of a paper or a library: quoted beside the strongest
    other_work: tuple[str, ...] = ()  # candidates that do less or something else: shown for scale, not as baselines

    @property
    def anchor(self) -> str:
        return re.sub(r"\W", "-", self.benchmark)

    @property
    def is_operator(self) -> bool:
        return self.benchmark in ops.__all__

    @property
    def is_profile(self) -> bool:
        return self.benchmark.startswith("profile ")

    @property
    def command(self) -> str:
        """The command that measures it."""
        if self.is_operator:
            return f"peft-kernels bench {self.benchmark}"
        if self.is_profile:
            return f"peft-kernels {self.benchmark}"
        return f"python benchmarks/{self.benchmark}.py"


END_TO_END = (
    Section(
        "pid_generate",
        "PiD: generation",
        "T5-base's architecture. Prompts: M prompts of T tokens for each of b inputs of n tokens; beams: beam search"
        " with M beams. new: new tokens.",
    ),
    Section("dept_training", "DePT: training step", "T5-base's architecture, B rows of L tokens."),
    Section(
        "pasta_layer",
        "PASTA: the whole model",
        "BERT with a classification head, B rows of S tokens. Stock has no vectors, and its training step trains the"
        " head alone.",
        other_work=("stock", "operators alone"),
    ),
    Section("dect", "DecT: extraction and fitting", other_work=("the products alone",)),
    Section("ytuning_step", "Y-Tuning: training step"),
    Section("profile pid", "PiD: profile", "Stock: the encoder's output repeated for every stream."),
    Section("profile dept", "DePT: profile", "Stock: the authors' order of work."),
    Section(
        "profile pasta", "PASTA: profile", "Stock: a training step of full fine-tuning, and a forward without vectors."
    ),
    Section("profile dect", "DecT: profile", "Stock: logits of the whole vocabulary at every position."),
    Section("profile ytuning", "Y-Tuning: profile"),
)


def _of_operator(name: str) -> Section:
    declared = operator(name)
    return Section(name, declared.title, declared.about, declared.published)


SECTIONS = {entry.benchmark: entry for entry in (*map(_of_operator, ops.__all__), *END_TO_END)}


def section(benchmark: str) -> Section:
    """The section of a benchmark; an unknown one has its name as the title."""
    return SECTIONS.get(benchmark, Section(benchmark, benchmark))


def order(benchmark: str) -> tuple[int, str]:
    """Sort key: the known benchmarks in the order of this file, then all others by name."""
    names = list(SECTIONS)
    return (names.index(benchmark) if benchmark in names else len(names), benchmark)
