"""Workloads: inputs and prompts as token ids."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from .files import json_of, text_of

VOCAB_SIZE = 32128  # the T5 family's
BUILT_IN_PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Workload:
    """Every prompt is asked of every input, ``batch_size`` inputs at a time."""

    title: str
    inputs: list[list[int]]
    prompts: list[list[int]]
    batch_size: int = 1

    def batches(self) -> Iterator[list[list[int]]]:
        for i in range(0, len(self.inputs), self.batch_size):
            yield self.inputs[i : i + self.batch_size]


class WordIds:
    """Token ids without a tokenizer, for models with random weights: one id per word or punctuation mark, from its
    hash.

    Ids 0 to 2 are reserved for padding, end and unknown. Decoding restores every word seen, up to white space.
    """

    def __init__(self, vocab_size: int = VOCAB_SIZE):
        self.vocab_size = vocab_size
        self.words: dict[int, str] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self._id(word) for word in re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", text)]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(self.words.get(i, f"<{i}>") for i in ids)

    def _id(self, word: str) -> int:
        i = zlib.crc32(word.encode())
        while self.words.setdefault(3 + i % (self.vocab_size - 3), word) != word:
            i += 1
        return 3 + i % (self.vocab_size - 3)


@dataclass(frozen=True)
class Texts:
    """A workload before it has token ids."""

    of: str
    inputs: list[str]
    prompts: list[str]
    batch_size: int = 1
    about: str = ""

    def encoded(self, encoder, input_tokens: int) -> Workload:
        """Tokenize the texts.

        Raises:
            ValueError: an input or a prompt becomes no tokens.
        """
        inputs = [_cut(encoder.encode(text), input_tokens) for text in self.inputs]
        prompts = [encoder.encode(text, add_special_tokens=False) for text in self.prompts]
        for what, texts, ids in (("input", self.inputs, inputs), ("prompt", self.prompts, prompts)):
            if [] in ids:
                raise ValueError(f"the tokenizer makes no token of the {what} {texts[ids.index([])][:60]!r}")
        title = f"{self.of}: {_span(inputs)} tokens, {len(prompts)} prompts of {_span(prompts)} tokens{self.about}"
        return Workload(title, inputs, prompts, self.batch_size)


def _span(rows: list[list[int]]) -> str:
    lengths = sorted(map(len, rows))
    return str(lengths[0]) if lengths[0] == lengths[-1] else f"{lengths[0]} to {lengths[-1]}"


def texts_of(input: Path | None, prompts: Path | None) -> Texts:
    """One input and many prompts, from the files or from the package's own texts.

    Raises:
        ValueError: a file that is not text, or is empty.
    """
    text = text_of(input, "--input") if input else built_in_text()
    lines = [
        line.strip()
        for line in (text_of(prompts, "--prompts") if prompts else _built_in("questions.txt")).splitlines()
        if line.strip()
    ]
    for option, path, content in (("--input", input, text.strip()), ("--prompts", prompts, lines)):
        if not content:
            raise ValueError(f"{option}: {path} is an empty file")
    return Texts(input.name if input else "built-in text", [text], lines)


def built_in(input_tokens: int = 512, prompts: int = 30) -> Workload:
    """The package's own text and questions, one id per word: prompts of 8 tokens."""
    words = WordIds()
    asked = [words.encode(line) for line in _built_in("questions.txt").splitlines()][:prompts]
    return Workload("built-in text", [_cut(words.encode(built_in_text()), input_tokens)], asked)


def dialogues(path: Path, limit: int, batch_size: int) -> Texts:
    """WOZ 2.0: every dialogue up to its last turn, one prompt per slot of the ontology beside the file.

    Raises:
        ValueError: a file that does not have this format, or is empty.
    """
    content = json_of(path, "--data")
    beside = path.parent / "ontology_en.json"
    if not isinstance(content, list) or not content:
        raise ValueError(f"--data: {path} must be a list of dialogues, got {_kind(content)}")
    selection = content[:limit] if limit else content
    inputs = [_text(dialogue, f"--data: dialogue {i} of {path}") for i, dialogue in enumerate(selection)]
    if not beside.is_file():
        raise ValueError(f"--data: expected the slots in {beside}, and there is no such file")
    ontology = json_of(beside, "--data")
    if not isinstance(ontology, dict) or not all(
        isinstance(ontology.get(key), list | dict) for key in ("informable", "requestable")
    ):
        raise ValueError(
            f"--data: {beside} must be an object whose 'informable' and 'requestable' name slots, got {_kind(ontology)}"
        )
    informable = [slot for slot in ontology["informable"] if slot != "request"]
    asked = [f"what {slot} does the user want?" for slot in informable]
    asked += [f"does the user ask for the {slot}?" for slot in ontology["requestable"]]
    if not asked:
        raise ValueError(f"--data: {beside} names no slot to ask for")
    about = (
        f": {', '.join(map(str, informable))} and {len(ontology['requestable'])} requestable slots; batches of"
        f" {batch_size}"
    )
    return Texts(
        f"{len(selection)} of the {len(content)} dialogues of {path.name}, last turn", inputs, asked, batch_size, about
    )


def _text(dialogue, where: str) -> str:
    turns = dialogue.get("dialogue") if isinstance(dialogue, dict) else None
    try:
        said = [
            (who, turn[key]) for turn in turns for who, key in (("system", "system_transcript"), ("user", "transcript"))
        ]
        text = " ".join(f"{who}: {words.strip()}" for who, words in said if words)
    except (AttributeError, KeyError, TypeError):
        text = ""
    if not text:
        raise ValueError(
            f"{where} must have 'dialogue', turns with 'system_transcript' and 'transcript', and something said in them"
        )
    return text


def _kind(content) -> str:
    name = {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(content), "a number")
    return name if content else f"{name} without anything in it"


def _cut(ids: list[int], length: int) -> list[int]:
    """At most ``length`` ids; the last id, a tokenizer's end mark, is kept."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def tokenizer(name: str | None):
    """Load a tokenizer; without a name, ``WordIds``.

    Raises:
        OSError, ValueError: raised by transformers if it finds none.
    """
    if name is None:
        return WordIds()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def built_in_text() -> str:
    return _built_in("encode_once.txt")


def _built_in(name: str) -> str:
    return (files("peft_kernels.perf") / "texts" / name).read_text(encoding="utf-8")
