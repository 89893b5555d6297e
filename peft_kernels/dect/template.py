"""Templates with one mask for texts, and the first pieces of label words at the mask."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from ..hf.frozen import is_ordered, strings

TEXT, MASK = "{text}", "{mask}"
T5_MASK = "<extra_id_0>"


@dataclass(frozen=True)
class Encoded:
    """One text: its token ids and the position at which the model predicts the masked word."""

    input_ids: list[int]
    position: int


class Template:
    """A template such as ``"{text} It was {mask}."``, with one ``{text}`` and one ``{mask}``.

    Decoder tuning (DecT), arXiv 2212.08408. A text that is too long is cut at its end; the template is never cut.

    Args:
        template: see above. A causal model's template ends with ``{mask}``, because the model predicts the next token.
        tokenizer: the model's tokenizer; its mask token replaces ``{mask}``, in T5 ``<extra_id_0>``, in a causal model
            nothing.
        max_length: the most tokens of a text in its template.
        causal: whether the model predicts the next token instead of a mask.

    Raises:
        ValueError: a placeholder is missing or occurs twice, ``{mask}`` is not last in a causal model's template, or
            the tokenizer has no mask token.
    """

    def __init__(self, template: str, tokenizer, max_length: int, *, causal: bool = False):
        if not isinstance(template, str):
            raise TypeError(f"DecT: template must be a string, got {type(template).__name__}")
        for placeholder in (TEXT, MASK):
            if template.count(placeholder) != 1:
                raise ValueError(f"DecT: template must contain {placeholder} once, got {template!r}")
        if causal and not template.endswith(MASK):
            raise ValueError(
                f"DecT: a causal model predicts the next token, so template must end with {MASK}, got {template!r}"
            )
        self.template, self.tokenizer, self.max_length, self.causal = template, tokenizer, max_length, causal
        before_mask = template[: template.index(MASK)]
        self.mask_first = not before_mask
        self.spaced = before_mask[-1:].isspace()
        self.mask_follows_text = template.index(TEXT) < template.index(MASK)
        self.mask_token = "" if causal else mask_token(tokenizer)
        self.mask_id = None if causal else tokenizer.convert_tokens_to_ids(self.mask_token)

    def fill(self, text: str) -> str:
        """The string to tokenize. A causal model's ends without a space, because the predicted words begin with it."""
        filled = self.template.replace(MASK, self.mask_token).replace(TEXT, text)
        return filled.rstrip() if self.causal else filled

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode every text in the template, cut at its end where it is too long.

        Raises:
            ValueError: the template alone is too long, or its tokens do not contain the mask.
        """
        rows = self._ids(self.cut(texts))
        return [Encoded(ids, self.position(ids)) for ids in rows]

    def cut(self, texts: Sequence[str]) -> list[str]:
        """The texts, cut to fit into the template."""
        texts = list(texts)
        return [self._cut(text) if len(ids) > self.max_length else text for text, ids in zip(texts, self._ids(texts))]

    def _cut(self, text: str) -> str:
        fits = bisect_right(range(len(text)), self.max_length, key=lambda n: len(self._ids([text[:n]])[0]))
        if fits == 0:
            raise ValueError(
                f"DecT: the template takes more than max_length={self.max_length} tokens: the mask would be truncated"
                " away"
            )
        return text[: fits - 1]

    def position(self, ids: Sequence[int]) -> int:
        """The position that predicts the masked word: the template's mask, or in a causal model the last token."""
        if self.causal:
            if not ids:
                raise ValueError("DecT: a text is empty, and so is its template: there is no token to predict from")
            return len(ids) - 1
        masks = [i for i, token in enumerate(ids) if token == self.mask_id]  # a text may have masks of its own
        if not masks:
            raise ValueError(
                f"DecT: the mask {self.mask_token!r} is not among the tokens of a text in its template"
                f" {self.template!r}"
            )
        return masks[-1] if self.mask_follows_text else masks[0]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        rows = self.tokenizer([self.fill(text) for text in texts], truncation=False, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        # nothing is predicted after an end token
        return [ids[:-1] if self.causal and ids[-1:] == [end] else list(ids) for ids in rows]

    def label_ids(self, label_words: Sequence[Sequence[str] | str]) -> list[list[int]]:
        """For every class, the ids of its words' first pieces, padded with -1.

        A word is tokenized as it would be at the mask: after a space if the template or the word itself has one there,
        otherwise after a character that is not a letter, or at the start of a text. BPE tokenizers distinguish these.

        Raises:
            ValueError: a class has no words, a word has no pieces or is unknown to the tokenizer, or two classes have
                the same pieces.
        """
        if isinstance(label_words, Mapping):
            raise TypeError(
                "DecT: label_words must be a sequence with the words of each class in order, got a mapping: give"
                " list(label_words.values()), and list(label_words) as classes of DecoderTuning"
            )
        if not is_ordered(label_words):
            kind = "one string" if isinstance(label_words, str) else type(label_words).__name__
            raise TypeError(f"DecT: label_words must be a sequence with the words of each class in order, got {kind}")
        classes = []
        for i, words in enumerate(label_words):
            words = [words] if isinstance(words, str) else sorted(words) if isinstance(words, Set) else words
            classes.append(strings("DecT", f"label_words[{i}]", words))
        if not classes:
            raise ValueError("DecT: label_words must have at least one class, got none")
        pieces = []
        for i, words in enumerate(classes):
            if not words:
                raise ValueError(f"DecT: label_words must have a word for every class, got none for class {i}")
            pieces.append(list(dict.fromkeys(self._first_piece(word) for word in words)))
            if set(pieces[i]) in map(set, pieces[:i]):
                raise ValueError(
                    f"DecT: the first pieces of the words of class {i}, {words}, are those of another class:"
                    f" {pieces[i]}"
                )
        width = max(map(len, pieces))
        return [ids + [-1] * (width - len(ids)) for ids in pieces]

    def _first_piece(self, word: str) -> int:
        spaced, bare = self.spaced or word[:1].isspace(), word.strip()
        prefix = "" if self.mask_first and not spaced else "a" if spaced else "("
        pieces = self._plain(f"{prefix}{' ' if spaced else ''}{bare}") if bare else []
        prefix_pieces = self._plain(prefix)
        if pieces[: len(prefix_pieces)] == prefix_pieces:
            pieces = pieces[len(prefix_pieces) :]
        else:  # the word has merged with the prefix
            pieces = self._plain(f"{' ' if spaced else ''}{bare}")
        if not pieces or pieces[0] == self.tokenizer.unk_token_id:
            raise ValueError(f"DecT: the label word {word!r} has no piece in the tokenizer")
        return pieces[0]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def mask_token(tokenizer) -> str:
    if tokenizer.mask_token is not None:
        return tokenizer.mask_token
    if T5_MASK in tokenizer.get_vocab():
        return T5_MASK
    raise ValueError(
        f"DecT: {type(tokenizer).__name__} has neither a mask token nor {T5_MASK}, so there is no position to read"
    )
