"""Extraction of the hidden state at the mask and the logits of the label words, one forward per text."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..hf.fingerprint import fingerprint
from ..hf.frozen import eval_mode, frozen_model, integer, max_length_of, strings
from ..hf.peft_method import is_causal, is_encoder_decoder
from .cache import FeatureFile
from .mask_row import MaskRow
from .template import T5_MASK, Encoded, Template

SAVE_SECONDS = 30.0  # between two saves, or SAVE_SHARE times the duration of a save if that is longer
SAVE_SHARE = 20


@dataclass(frozen=True)
class Extraction:
    """The inputs of a classifier, in the order of the texts; float32, on the CPU.

    Attributes:
        features: (N, H), hidden states at the mask.
        scores: (N, C), logits of the classes' label words; None without ``label_words``.
        empty_scores: (C,), scores of the empty text, that is of the template alone; None without ``label_words``.
    """

    features: Tensor
    scores: Tensor | None
    empty_scores: Tensor | None


def extract(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    template: str,
    label_words: Sequence[Sequence[str] | str] | None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    cache: str | Path | None = None,
) -> Extraction:
    """Run ``model`` once on every text in ``template`` and return the features and scores at the mask.

    Decoder tuning (DecT), arXiv 2212.08408, section 3.1. The head reads only the mask's row and computes only the label
    words.

    Args:
        model: a transformers model, in training or eval mode: a masked language model, a causal one (the template ends
            with the mask), one of the T5 family (``<extra_id_0>`` is the mask; the decoder reads it after its start
            token), or an encoder without a head if ``label_words`` is None. With PEFT the features are those of the
            active adapter.
        tokenizer: the model's tokenizer.
        texts: strings, in any ordered iterable.
        template: for example ``"{text} It was {mask}."``. A text that is too long is cut at its end; the template is
            never cut. A space before ``{mask}`` changes how label words are tokenized: BPE tokenizers have different
            tokens for "great" and " great".
        label_words: for every class, in order, one word or several; a word of several pieces counts by its first. None:
            no scores.
        batch_size: texts per forward; they are sorted by length and padded to the longest of the batch.
        max_length: the most tokens of a text in its template; None: the limit of model and tokenizer.
        cache: path of a safetensors file. It is read if it was made from the same model, weights, active adapters,
            autocast, token ids and words; otherwise it is written. It is saved every half minute, and an interrupted
            run continues from it. Its contents are used only if their checksum matches.

    Raises:
        ValueError: the template has no text or mask or is too long, a class is empty, a word has no pieces, the model
            gives no scores, or ``cache`` cannot be written or is another kind of file.
        TypeError: ``model`` is not a transformers model, or a text or word is not a string.

    Several threads may extract from one model at once; meanwhile it is in eval mode for all.
    """
    pretrained = frozen_model("DecT", model)
    texts = strings("DecT", "texts", texts)
    batch_size = integer("DecT", "batch_size", batch_size, 1)
    parsed = template_for(pretrained, tokenizer, template, max_length)
    label_ids = None if label_words is None else parsed.label_ids(label_words)
    row = MaskRow(pretrained, label_ids, decoder_ids_for(pretrained, parsed))
    encoded = parsed.encode([*texts, ""])
    # the empty text first, then the longest texts, so that running out of memory shows early
    order = [len(texts), *sorted(range(len(texts)), key=lambda i: -len(encoded[i].input_ids))]
    file = None
    if cache is not None:
        rows = [(e.input_ids, e.position) for e in encoded]
        inputs = {"label_ids": label_ids, "decoder_ids": row.decoder_ids, "rows": rows}
        file = FeatureFile(cache, fingerprint(row.module, row.base, inputs))
    tensors = _run(pretrained, row, [encoded[i] for i in order], batch_size, padding_id(tokenizer), file)
    original_order = torch.tensor(order).argsort()
    features, scores = tensors["features"][original_order], tensors.get("scores")
    if scores is None:
        return Extraction(features[:-1].clone(), None, None)
    scores = scores[original_order]
    return Extraction(features[:-1].clone(), scores[:-1].clone(), scores[-1].clone())


def template_for(model, tokenizer, template: str, max_length: int | None) -> Template:
    if is_encoder_decoder(model) and T5_MASK not in tokenizer.get_vocab():
        raise ValueError(
            f"DecT: the tokenizer of an encoder-decoder model must have T5's mask, but {type(tokenizer).__name__} has"
            f" no {T5_MASK}"
        )
    limit = max_length_of(model, tokenizer, 512) if max_length is None else integer("DecT", "max_length", max_length, 1)
    return Template(template, tokenizer, limit, causal=is_causal(model))


def decoder_ids_for(model, template: Template) -> list[int] | None:
    """The decoder's input ids: T5 predicts the masked word after the mask token."""
    if not is_encoder_decoder(model) or template.mask_id is None:
        return None
    return [model.config.decoder_start_token_id, template.mask_id]


def padding_id(tokenizer) -> int:
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # padding is masked, so any id works


def padded(rows: Sequence[Encoded], pad: int, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask, (B, S), padded on the right, so that causal models need no position ids, and positions (B,)."""
    lengths = [len(row.input_ids) for row in rows]
    longest = max(lengths)
    ids = [row.input_ids + [pad] * (longest - n) for row, n in zip(rows, lengths)]
    mask = [[1] * n + [0] * (longest - n) for n in lengths]
    positions = torch.tensor([row.position for row in rows], device=device)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device), positions


def _run(
    model, row: MaskRow, encoded: list[Encoded], batch_size: int, pad: int, file: FeatureFile | None
) -> dict[str, Tensor]:
    """Features (N, H) and, with label words, scores (N, C) of ``encoded``, the empty text first.

    Rows that ``file`` has are not computed again.
    """
    finished = file.read() if file else None
    batches = [] if finished is None else [finished]
    done = saved = sum(len(x["features"]) for x in batches)
    if file and done < len(encoded):
        file.check_writable()

    # accelerate's hooks fetch offloaded weights and move the inputs
    device = None if model.device.type == "meta" else model.device

    def concatenated():
        return {name: torch.cat([x[name] for x in batches]) for name in batches[0]}

    def save():
        nonlocal saved
        file.write(concatenated())
        saved = done

    with (
        eval_mode(model),
        logging.tqdm(total=len(encoded) - 1, initial=max(0, done - 1), desc="features", unit=" texts") as progress,
    ):
        next_save = time.monotonic() + SAVE_SECONDS
        try:
            while done < len(encoded):
                batch = encoded[done : done + batch_size] if done else encoded[:1]
                x, s = row(*padded(batch, pad, device))
                batches.append({"features": x.cpu()} if s is None else {"features": x.cpu(), "scores": s.cpu()})
                done += len(batch)
                progress.update(len(batch) if done > 1 else 0)
                if file and (start := time.monotonic()) >= next_save:
                    save()
                    next_save = time.monotonic() + max(SAVE_SECONDS, SAVE_SHARE * (time.monotonic() - start))
        except BaseException:
            if file and done > saved:
                with suppress(Exception):  # raise the error that stopped the run, not that of the save
                    save()
            raise
    if file and done > saved:
        save()
    return concatenated()
