"""One query of a frozen model per text: the hidden state at the mask and the logits of the label words."""

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
from ..hf.frozen import evaluating, frozen_model, max_length_of, strings, whole
from ..hf.peft_method import is_causal, is_encoder_decoder
from .cache import FeatureFile
from .mask_row import MaskRow
from .template import T5_MASK, Encoded, Template

SAVE_SECONDS = 30.0  # between two saves, or SAVE_SHARE times as long as a save takes
SAVE_SHARE = 20


@dataclass(frozen=True)
class Extraction:
    """The inputs of a classifier, in the order of the texts; float32, on the CPU.

    Attributes:
        features: (N, H), hidden states at the mask.
        scores: (N, C), logits of the classes' label words; None: none were asked for.
        empty_scores: (C,), scores of the empty text: what the model answers to the template alone.
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
    """Run ``model`` once on every text in ``template``.

    Decoder tuning (DecT), arXiv 2212.08408, section 3.1. The head sees the mask's row alone and computes the label words alone.

    Args:
        model: of transformers, in any mode: masked language models, causal ones (the template ends with the mask), the T5 family
            (``<extra_id_0>`` is the mask, its decoder reads that after its start), and encoders without a head if ``label_words`` is None.
            With adapters of PEFT the features are those of the active one.
        tokenizer: of the model.
        texts: strings, in any iterable that has an order.
        template: such as ``"{text} It was {mask}."``. A too long text is cut at its end, the template never. Whether a space precedes
            ``{mask}`` decides how label words are read: in tokenizers of the BPE kind "great" and " great" are different tokens.
        label_words: for every class, in order, one word or several; of a word of several pieces the first counts. None: no scores.
        batch_size: texts of one forward pass; they are sorted by length and padded to the longest of the batch.
        max_length: tokens of a text in its template; None: what model and tokenizer allow.
        cache: a safetensors file. It is read if it was made from the same model, weights, active adapters, autocast, token ids and words;
            else it is written. It is saved every half minute, and a run that was stopped goes on from there; nothing in it is taken
            without its checksum.

    Raises:
        ValueError: a template without text or mask or too long, an empty class, a word without pieces, a model that gives no scores, or
            a ``cache`` that cannot be written or is a file of something else.
        TypeError: ``model`` is not one of transformers, or a text or word is not a string.

    Threads may extract from one model at once; while they do, it is in eval mode for all.
    """
    pretrained = frozen_model("DecT", model)
    texts = strings("DecT", "texts", texts)
    batch_size = whole("DecT", "batch_size", batch_size, 1)
    filled = template_for(pretrained, tokenizer, template, max_length)
    label_ids = None if label_words is None else filled.label_ids(label_words)
    row = MaskRow(pretrained, label_ids, decoder_ids_for(pretrained, filled))
    encoded = filled.encode([*texts, ""])
    # the empty text first, then what does not fit into memory
    order = [len(texts), *sorted(range(len(texts)), key=lambda i: -len(encoded[i].input_ids))]
    file = None
    if cache is not None:
        inputs = {"label_ids": label_ids, "decoder_ids": row.decoder_ids, "rows": [(e.input_ids, e.position) for e in encoded]}
        file = FeatureFile(cache, fingerprint(row.runs, row.base, inputs))
    found = _run(pretrained, row, [encoded[i] for i in order], batch_size, padding_id(tokenizer), file)
    places = torch.tensor(order).argsort()
    features, scores = found["features"][places], found.get("scores")
    if scores is None:
        return Extraction(features[:-1].clone(), None, None)
    scores = scores[places]
    return Extraction(features[:-1].clone(), scores[:-1].clone(), scores[-1].clone())


def template_for(model, tokenizer, template: str, max_length: int | None) -> Template:
    if is_encoder_decoder(model) and T5_MASK not in tokenizer.get_vocab():
        raise ValueError(f"DecT: encoder-decoder models are read as T5 is, but {type(tokenizer).__name__} has no {T5_MASK}")
    most = max_length_of(model, tokenizer, 512) if max_length is None else whole("DecT", "max_length", max_length, 1)
    return Template(template, tokenizer, most, causal=is_causal(model))


def decoder_ids_for(model, template: Template) -> list[int] | None:
    """T5 predicts masked words behind the mask's name."""
    if not is_encoder_decoder(model) or template.mask_id is None:
        return None
    return [model.config.decoder_start_token_id, template.mask_id]


def padding_id(tokenizer) -> int:
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # padding is masked: any id does


def padded(rows: Sequence[Encoded], pad: int, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask, (B, S), padded on the right, where causal models need no position ids, and positions (B,)."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [pad] * (longest - len(row.input_ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in rows], device=device)
    return ids, mask, torch.tensor([row.position for row in rows], device=device)


def _run(model, row: MaskRow, encoded: list[Encoded], batch_size: int, pad: int, file: FeatureFile | None) -> dict[str, Tensor]:
    """Features (N, H) and perhaps scores (N, C) of ``encoded``, whose first is the empty text; what ``file`` holds is not made again."""
    found = file.read() if file else None
    rows = [] if found is None else [found]
    done = saved = sum(len(x["features"]) for x in rows)
    if file and done < len(encoded):
        file.check_writable()

    device = None if model.device.type == "meta" else model.device  # accelerate's hooks fetch offloaded weights and move the inputs

    def together():
        return {name: torch.cat([x[name] for x in rows]) for name in rows[0]}

    def save():
        nonlocal saved
        file.write(together())
        saved = done

    with evaluating(model), logging.tqdm(total=len(encoded) - 1, initial=max(0, done - 1), desc="features", unit=" texts") as progress:
        due = time.monotonic() + SAVE_SECONDS
        try:
            while done < len(encoded):
                batch = encoded[done : done + batch_size] if done else encoded[:1]
                x, s = row(*padded(batch, pad, device))
                rows.append({"features": x.cpu()} if s is None else {"features": x.cpu(), "scores": s.cpu()})
                done += len(batch)
                progress.update(len(batch) if done > 1 else 0)
                if file and (start := time.monotonic()) >= due:
                    save()
                    due = time.monotonic() + max(SAVE_SECONDS, SAVE_SHARE * (time.monotonic() - start))
        except BaseException:
            if file and done > saved:
                with suppress(Exception):  # what stopped the run is what is told
                    save()
            raise
    if file and done > saved:
        save()
    return together()
