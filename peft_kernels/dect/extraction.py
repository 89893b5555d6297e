"""One query of a frozen model per text: the hidden state at the mask and the logits of the label words."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from ..peft_method import check_pretrained, is_causal, is_encoder_decoder
from . import cache as caching
from .mask_row import MaskRow
from .template import T5_MASK, Encoded, Template, max_length_of


@dataclass(frozen=True)
class Extraction:
    """What a classifier is made from, in the order of the texts; float32, on the CPU."""

    features: Tensor  # (N, H)
    scores: Tensor | None  # (N, C)
    empty_scores: Tensor | None  # (C,), those of the empty text: what the model thinks of the template alone


def extract(
    model,
    tokenizer,
    texts: Sequence[str],
    template: str,
    label_words: Sequence[Sequence[str] | str] | None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    cache: str | Path | None = None,
) -> Extraction:
    """Run ``model`` once on every text in ``template``.

    Decoder tuning (DecT), arXiv 2212.08408, section 3.1. The head sees the mask's row alone and computes the label words alone.

    Args:
        model: of transformers, in any mode: masked language models, causal ones (the template ends with the mask), the T5 family
            (``<extra_id_0>`` is the mask, its decoder reads that after its start), and encoders without a head if ``label_words`` is None.
        tokenizer: of the model.
        texts: strings.
        template: such as ``"{text} It was {mask}."``. A too long text is cut at its end, the template never. Whether a space precedes
            ``{mask}`` decides how label words are read: in tokenizers of the BPE kind "great" and " great" are different tokens.
        label_words: for every class one word or several; of a word of several pieces the first counts. None: no scores.
        batch_size: texts of one forward pass; they are sorted by length and padded to the longest of the batch.
        max_length: tokens of a text in its template; None: what model and tokenizer allow.
        cache: a safetensors file, read if it was made from the same model, weights, texts, template and words, else written.

    Raises:
        ValueError: a template without text or mask or too long, an empty class, a word without pieces, or a model that gives no scores.
        TypeError: ``model`` is not one of transformers, or a text is not a string.
    """
    check_pretrained("DecT", model)
    if isinstance(texts, str) or not all(isinstance(x, str) for x in texts):
        raise TypeError(f"DecT: texts must be a sequence of strings, got {sorted({type(x).__name__ for x in texts} | {type(texts).__name__})}")
    if batch_size < 1:
        raise ValueError(f"DecT: batch_size must be at least 1, got {batch_size}")
    filled = template_for(model, tokenizer, template, max_length)
    label_ids = None if label_words is None else filled.label_ids(label_words)
    decoder_ids = decoder_ids_for(model, filled)
    row = MaskRow(model, label_ids, decoder_ids)
    encoded = filled.encode([*texts, ""])
    key = None
    if cache is not None:
        rows = [(e.input_ids, e.position) for e in encoded]
        key = caching.key_of(model, template=template, label_words=label_words, label_ids=label_ids, decoder_ids=decoder_ids, rows=rows)
        if (found := caching.read(Path(cache), key)) is not None:
            return Extraction(found["features"], found.get("scores"), found.get("empty_scores"))
    extraction = _run(model, row, encoded, batch_size, padding_id(tokenizer))
    if cache is not None:
        caching.write(Path(cache), key, {k: v for k, v in vars(extraction).items() if v is not None})
    return extraction


def template_for(model, tokenizer, template: str, max_length: int | None) -> Template:
    if is_encoder_decoder(model) and T5_MASK not in tokenizer.get_vocab():
        raise ValueError(f"DecT: encoder-decoder models are read as T5 is, but {type(tokenizer).__name__} has no {T5_MASK}")
    return Template(template, tokenizer, max_length or max_length_of(model, tokenizer), causal=is_causal(model))


def decoder_ids_for(model, template: Template) -> list[int] | None:
    """T5 predicts masked words behind the mask's name."""
    return [model.config.decoder_start_token_id, template.mask_id] if is_encoder_decoder(model) else None


def padding_id(tokenizer) -> int:
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # padding is masked: any id does


def padded(rows: Sequence[Encoded], pad: int, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask, (B, S), padded on the right, where causal models need no position ids, and positions (B,)."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [pad] * (longest - len(row.input_ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in rows], device=device)
    return ids, mask, torch.tensor([row.position for row in rows], device=device)


def _run(model, row: MaskRow, encoded: list[Encoded], batch_size: int, pad: int) -> Extraction:
    """The last of ``encoded`` is the empty text."""
    *texts, empty = range(len(encoded))
    texts.sort(key=lambda i: -len(encoded[i].input_ids))  # what does not fit into memory fails at once
    batches = [[empty], *(texts[i : i + batch_size] for i in range(0, len(texts), batch_size))]
    features, scores = [], []
    with _evaluating(model), logging.tqdm(total=len(texts), desc="features", unit=" texts") as progress:
        for batch in batches:
            x, s = row(*padded([encoded[i] for i in batch], pad, model.device))
            features.append(x.cpu())
            scores.append(None if s is None else s.cpu())
            progress.update(0 if batch == [empty] else len(batch))
    order = torch.tensor([i for batch in batches for i in batch]).argsort()
    x = torch.cat(features)[order]
    if row.columns is None:
        return Extraction(x[:-1].clone(), None, None)
    s = torch.cat(scores)[order]
    return Extraction(x[:-1].clone(), s[:-1].clone(), s[-1].clone())


@contextmanager
def _evaluating(model):
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
