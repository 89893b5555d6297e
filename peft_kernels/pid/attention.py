"""Attention functions that transformers looks up by name; ``pid.enable`` sets the name."""

import sys

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ..ops import shared_cross_attention
from ..ops.shared_cross_attention.layout import fold, unfold
from . import streams

NAMES = {"sdpa": "peft_kernels_sdpa", "eager": "peft_kernels_eager"}


def sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Run our operator for cross-attention with several streams per input, otherwise transformers' own function."""
    if not _shares(module, query, key, attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        return _folded(sdpa_attention_forward, module, query, key, value, attention_mask, dropout, scaling, kwargs)
    lengths, index, starts = streams.unpack(attention_mask, key.shape[0])
    out = shared_cross_attention(
        query, key, value, key_lengths=lengths, encoder_index=index, cu_streams=starts, scale=scaling
    )
    return out.transpose(1, 2), None


def eager(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Run the model's own eager function, which can return attention weights; streams of one input are folded."""
    stock = sys.modules[type(module).__module__].eager_attention_forward
    if not _shares(module, query, key, attention_mask):
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    return _folded(stock, module, query, key, value, attention_mask, dropout, scaling, kwargs)


def configs_of(model: nn.Module) -> list:
    """The configurations from which a model's attention modules read their implementation, without duplicates."""
    configs = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]
    return list({id(config): config for config in configs}.values())


def adopt(configs: list) -> None:
    """Replace the names of stock functions with ours, unless they are ours.

    ``set_attn_implementation`` may restore a stock name at any time; Whisper calls it itself.
    """
    if not is_adopted(configs):
        rename(configs, NAMES)


def is_adopted(configs: list) -> bool:
    return all(config._attn_implementation in NAMES.values() for config in configs)


def rename(configs: list, names: dict[str, str]) -> None:
    # read all first: a parent's setter also sets its sub-configs
    current = [config._attn_implementation for config in configs]
    for config, name in zip(configs, current):
        config._attn_implementation = names.get(name, name)


AttentionInterface.register(NAMES["sdpa"], sdpa)
AttentionMaskInterface.register(NAMES["sdpa"], sdpa_mask)
AttentionInterface.register(NAMES["eager"], eager)
AttentionMaskInterface.register(NAMES["eager"], eager_mask)


def _shares(module, query, key, attention_mask) -> bool:
    return getattr(module, "pid_cross_attention", False) and (
        query.shape[0] != key.shape[0] or streams.is_packed(attention_mask)
    )


def _folded(stock, module, query, key, value, packed, dropout, scaling, kwargs) -> tuple[Tensor, Tensor | None]:
    """Run a stock function on (b, H, M*t, D) queries; for ragged streams, keys and values are gathered per stream."""
    inputs, tokens = key.shape[0], query.shape[2]
    lengths, index, _ = streams.unpack(packed, inputs)
    if index is not None:
        key, value = key[index], value[index]
        lengths, inputs = lengths[index], index.shape[0]
    mask = None
    if lengths is not None:
        mask = (torch.arange(key.shape[2], device=key.device) < lengths[:, None])[:, None, None]  # (b, 1, 1, n)
        if stock is not sdpa_attention_forward:
            mask = query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
    kwargs = {**kwargs, "position_bias": None, "is_causal": False}  # T5's bias is all zeros here
    out, weights = stock(module, fold(query, inputs), key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    out = unfold(out.transpose(1, 2), tokens).transpose(1, 2)  # (N, t, H, D)
    return out, None if weights is None else unfold(weights, tokens)
