"""What is asked of what: inputs and prompts as token ids."""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

VOCAB_SIZE = 32128  # of the T5 family
BUILT_IN_PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Workload:
    """Every prompt is asked of every input; ``batch_size`` inputs at a time."""

    title: str
    inputs: list[list[int]]
    prompts: list[list[int]]
    batch_size: int = 1

    def batches(self) -> Iterator[list[list[int]]]:
        for i in range(0, len(self.inputs), self.batch_size):
            yield self.inputs[i : i + self.batch_size]


class WordIds:
    """Token ids without a tokenizer, for models with random weights: one id per word or punctuation mark, wherever its hash falls.

    Ids 0 to 2 stay free for padding, end and unknown. Reversible for every word seen, up to white space.
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


def chosen(
    model: str | None,
    tokenizer: str | None,
    input: Path | None,
    prompts: Path | None,
    data: Path | None,
    input_tokens: int,
    limit: int,
    batch_size: int,
) -> Workload:
    """The workload that the options of ``peft-kernels demo`` name."""
    encoder = _tokenizer(tokenizer or model)
    if data is not None:
        return dialogues(data, encoder, input_tokens, limit, batch_size)
    text = input.read_text() if input else built_in_text()
    lines = [line.strip() for line in (prompts.read_text() if prompts else _built_in("questions.txt")).splitlines() if line.strip()]
    ids = _cut(encoder.encode(text), input_tokens)
    asked = [encoder.encode(line, add_special_tokens=False) for line in lines]
    if not ids or not asked:
        raise SystemExit(f"peft-kernels demo: {'--input' if not ids else '--prompts'} is an empty file")
    lengths = sorted(map(len, asked))
    span = str(lengths[0]) if lengths[0] == lengths[-1] else f"{lengths[0]} to {lengths[-1]}"
    return Workload(f"{input.name if input else 'built-in text'}: {len(ids)} tokens, {len(asked)} prompts of {span} tokens", [ids], asked)


def built_in(input_tokens: int = 512, prompts: int = 30) -> Workload:
    """The package's own text and questions, an id per word: prompts of 8 tokens."""
    words = WordIds()
    asked = [words.encode(line) for line in _built_in("questions.txt").splitlines()][:prompts]
    return Workload("built-in text", [_cut(words.encode(built_in_text()), input_tokens)], asked)


def dialogues(path: Path, encoder, input_tokens: int, limit: int, batch_size: int) -> Workload:
    """WOZ 2.0: every dialogue up to its last turn, one prompt per slot of the ontology beside the file."""
    found = json.loads(path.read_text())
    taken = found[:limit] if limit else found
    ontology = json.loads((path.parent / "ontology_en.json").read_text())
    informable = [slot for slot in ontology["informable"] if slot != "request"]
    asked = [f"what {slot} does the user want?" for slot in informable]
    asked += [f"does the user ask for the {slot}?" for slot in ontology["requestable"]]
    inputs = [_cut(encoder.encode(_text(dialogue["dialogue"])), input_tokens) for dialogue in taken]
    title = (
        f"{len(taken)} of the {len(found)} dialogues of {path.name}, last turn, {min(map(len, inputs))} to {max(map(len, inputs))} tokens;"
        f" {len(asked)} prompts: {', '.join(informable)} and {len(ontology['requestable'])} requestable slots; batches of {batch_size}"
    )
    return Workload(title, inputs, [encoder.encode(line, add_special_tokens=False) for line in asked], batch_size)


def _text(turns: list[dict]) -> str:
    said = [(who, turn[key]) for turn in turns for who, key in (("system", "system_transcript"), ("user", "transcript"))]
    return " ".join(f"{who}: {words}" for who, words in said if words)


def _cut(ids: list[int], length: int) -> list[int]:
    """At most ``length`` ids; the last one, a tokenizer's end mark, stays."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _tokenizer(name: str | None):
    if name is None:
        return WordIds()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def built_in_text() -> str:
    return _built_in("encode_once.txt")


def _built_in(name: str) -> str:
    return (files("peft_kernels.bench") / "texts" / name).read_text(encoding="utf-8")
