"""Token ids, and a tokenizer for models that come without one."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from ...dect.template import T5_MASK

FIRST_ORDINARY_ID = 5  # random ids avoid the usual special tokens: padding, start, end, unknown


def random_ids(model: nn.Module, *shape: int, seed: int = 0) -> Tensor:
    """Random ids without padding, the same in every call."""
    vocab_size = min(model.get_input_embeddings().num_embeddings, model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.randint(FIRST_ORDINARY_ID, vocab_size, shape, generator=torch.Generator().manual_seed(seed)).to(
        model.device
    )
    pad = model.config.pad_token_id
    return ids if pad is None else ids.masked_fill(ids == pad, FIRST_ORDINARY_ID - 1)


def random_sentences(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Ids and mask (B, S), and labels of two classes (B,)."""
    ids = random_ids(model, batch, length)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.arange(batch, device=ids.device) % 2,
    }


def word_tokenizer(config: PreTrainedConfig, kind: str, words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one id per word, for the ``words`` that fit into the vocabulary, and this model type's special
    tokens around them.
    """
    mask, template = {
        "encoder": ("[MASK]", "[CLS] $A [SEP]"),
        "causal": ("[MASK]", "$A"),
        "encoder-decoder": (T5_MASK, "$A [SEP]"),
    }[kind]
    ordered = list(dict.fromkeys(["[CLS]", "[SEP]", "[UNK]", mask, *words]))[: config.vocab_size - 1]
    ordered.insert(min(config.pad_token_id or 0, len(ordered)), "[PAD]")
    vocabulary = {word: i for i, word in enumerate(ordered)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        template, special_tokens=[(x, vocabulary[x]) for x in ("[CLS]", "[SEP]")]
    )
    special = {"additional_special_tokens": [mask]} if kind == "encoder-decoder" else {"mask_token": mask}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **special)
