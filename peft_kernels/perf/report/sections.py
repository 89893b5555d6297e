"""What is known of a benchmark beside its rows: its title, what its letters mean, and which of its candidates do other work."""

import re
from dataclasses import dataclass

from ... import ops


@dataclass(frozen=True)
class Section:
    """How a benchmark is presented."""

    benchmark: str
    title: str
    about: str = ""
    published: str | None = None  # of an operator, the baseline of a paper or a library: quoted beside the strongest
    other_work: tuple[str, ...] = ()  # candidates that do less or something else: shown for scale, and no baselines

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
        """What measures it."""
        if self.is_operator:
            return f"peft-kernels bench {self.benchmark}"
        if self.is_profile:
            return f"peft-kernels {self.benchmark}"
        return f"python benchmarks/{self.benchmark}.py"


KNOWN = (
    Section(
        "shared_cross_attention",
        "Shared cross-attention",
        "PiD: all streams of an input read its keys and values, which lie in memory once. b inputs of n keys, M streams each of t queries,"
        " H heads of width D. Ragged: inputs of 50 to 100% of n.",
        published="sdpa expanded",
    ),
    Section(
        "decomposed_prompt_embedding",
        "Decomposed prompt embedding",
        "DePT: a soft prompt of m rows, then L embedded tokens with an update of rank r, for B rows of width d.",
        published="official",
    ),
    Section(
        "special_token_slots",
        "Slots of special tokens",
        "PASTA: where the special tokens of B rows of S tokens are, at most k in a row.",
        published="official",
    ),
    Section(
        "special_token_add",
        "Addition to special tokens",
        "PASTA: vectors of width d added to k special tokens in each of B rows of S tokens.",
        published="official",
    ),
    Section(
        "special_token_add_",
        "Addition to special tokens, in place",
        "PASTA: the same without a copy; other tokens are not touched.",
        published="official",
    ),
    Section(
        "add_layer_norm_inject",
        "Addition, layer norm and injection",
        "PASTA in a post-norm layer: residual, norm and the vectors of the next layer in one pass, for B rows of S tokens of width d with k vectors.",
        published="separate operations",
    ),
    Section(
        "add_inject_layer_norm",
        "Addition, injection and layer norm",
        "PASTA in a pre-norm layer: the same for models whose norm comes after the vectors.",
        published="separate operations",
    ),
    Section(
        "label_logits",
        "Logits of label words",
        "DecT: from states of width H, the logits of w words for each of C labels in B texts of S tokens, without those of all V words.",
        published="full LM head",
    ),
    Section(
        "prototype_scores",
        "Prototype scores",
        "DecT: N features of width H projected to width D, their distances to C prototypes, and the model's own scores.",
    ),
    Section("prototype_cross_entropy", "Prototype cross-entropy", "DecT: the loss of prototype scores."),
    Section("prototype_objective", "Prototype objective", "DecT: loss and gradients of prototype scores in one call."),
    Section(
        "label_cross_attention",
        "Label cross-attention",
        "Y-Tuning: S label slots attend to the n frozen features of B rows of width d. Padded: rows of different length.",
        published="keys and values, sdpa",
    ),
    Section(
        "pid_generate",
        "PiD: generation",
        "T5-base's architecture. Prompts: M prompts of T tokens for each of b inputs of n tokens; beams: beam search with M beams. new: new tokens.",
    ),
    Section("dept_training", "DePT: training step", "T5-base's architecture, B rows of L tokens."),
    Section(
        "pasta_layer",
        "PASTA: the whole model",
        "BERT with a classification head, B rows of S tokens. Stock has no vectors, and its training step trains the head alone.",
        other_work=("stock", "operators alone"),
    ),
    Section("dect", "DecT: extraction and fitting", other_work=("the products alone",)),
    Section("ytuning_step", "Y-Tuning: training step"),
    Section("profile pid", "PiD: profile", "Stock: the encoder's output repeated for every stream."),
    Section("profile dept", "DePT: profile", "Stock: the authors' order of work."),
    Section("profile pasta", "PASTA: profile", "Stock: a training step of full fine-tuning, and a forward without vectors."),
    Section("profile dect", "DecT: profile", "Stock: logits of the whole vocabulary at every position."),
    Section("profile ytuning", "Y-Tuning: profile"),
)
_KNOWN = {one.benchmark: one for one in KNOWN}


def section(benchmark: str) -> Section:
    """That of a benchmark; one that is not known has its name for a title."""
    return _KNOWN.get(benchmark, Section(benchmark, benchmark))


def order(benchmark: str) -> tuple[int, str]:
    """The known ones as they stand here, then all others by name."""
    names = list(_KNOWN)
    return (names.index(benchmark) if benchmark in names else len(names), benchmark)
