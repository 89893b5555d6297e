"""What differs between the encoder-decoder families of transformers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CROSS_ATTENTION_NAMES = ("EncDecAttention", "encoder_attn", "crossattention.self")


@dataclass(frozen=True)
class Family:
    positions: str  # of the decoder: "relative" (T5), "table" (embed_positions looked up by position), "argument" (position_ids)
    views_decoder_batch: bool = False  # its cross-attention views keys and values with the decoder's batch: hand it filled caches
    takes_encoder_mask: bool = True


_T5, _BART = Family("relative"), Family("table")
FAMILIES = {
    **dict.fromkeys(("t5", "mt5", "longt5"), _T5),
    "umt5": Family("relative", views_decoder_batch=True),
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "blenderbot-small", "plbart", "bigbird_pegasus"), _BART),
    "encoder-decoder": Family("argument"),
    "whisper": Family("table", views_decoder_batch=True, takes_encoder_mask=False),
}


def family_of(model: nn.Module) -> Family:
    """The family of an encoder-decoder model that goes through transformers' attention interface.

    Raises:
        ValueError: any other, named, with those that are supported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in FAMILIES and any(cross_attentions(model)):
        return FAMILIES[kind]
    what = f"model_type {kind!r}" if kind else f"a {type(model).__name__}"
    detail = " whose decoder has no cross-attention that is known" if kind in FAMILIES else ""
    raise ValueError(f"pid: {what}{detail} is not supported; supported are {', '.join(FAMILIES)}")


def cross_attentions(model: nn.Module):
    """The cross-attention modules, in the order of the layers."""
    return (module for name, module in model.named_modules() if name.endswith(CROSS_ATTENTION_NAMES))


def keys_and_values(attention: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """What the module would put into its cache: (b, H, n, D) keys and values of (b, n, d) encoder states."""
    width = next(getattr(attention, a) for a in ("key_value_proj_dim", "head_dim", "attention_head_size") if hasattr(attention, a))
    shape = (*states.shape[:2], -1, width)

    def project(*names):
        layer = next(getattr(attention, a) for a in names if hasattr(attention, a))
        return layer(states).view(shape).transpose(1, 2)

    return project("k", "k_proj", "key"), project("v", "v_proj", "value")


def positions_of(mask: Tensor, tokens: int) -> Tensor:
    """(N, t) positions of the last ``tokens`` columns, counted without padding, from the decoder's mask.

    ``mask`` is (N, length) with ones where there is a token, or the (N, 1, t, length) mask that transformers makes of it for a static cache.
    """
    if mask.ndim == 2:
        positions = mask.long().cumsum(1)[:, -tokens:] - 1
    else:
        visible = mask if mask.dtype == torch.bool else mask == 0
        positions = visible[:, 0].sum(-1) - 1
    return positions.clamp_min(0)


def look_up_positions(table: nn.Module, positions: Tensor) -> Tensor:
    """(N, t, d) rows of a decoder's ``embed_positions`` for (N, t) positions that start at 0.

    The module looks them up itself: where weights are offloaded, they are on the device inside of its forward alone.
    """
    if hasattr(table, "weights"):  # M2M100: a buffer whose first row is the padding's
        return table.weights[positions + table.padding_idx + 1]
    flat = positions.flatten()
    return table(flat, position_ids=flat).view(*positions.shape, -1)


def max_positions(model: nn.Module) -> int | None:
    """How many tokens the decoder has positions for; None where there is no limit."""
    family = FAMILIES[model.config.model_type]
    if family.positions == "argument":
        return model.decoder.config.max_position_embeddings
    table = getattr(model.get_decoder(), "embed_positions", None)
    if family.positions == "relative" or hasattr(table, "weights"):  # the latter grows
        return None
    return table.weight.shape[0] - getattr(table, "offset", 0)
