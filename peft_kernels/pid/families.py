"""Differences between the encoder-decoder families of transformers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CROSS_ATTENTION_NAMES = ("EncDecAttention", "encoder_attn", "crossattention.self")


@dataclass(frozen=True)
class Family:
    positions: str  # decoder positions: "relative" (T5), "table" (rows of embed_positions) or "argument" (position_ids)
    views_decoder_batch: bool = False  # cross-attention views keys by the decoder's batch size: it needs a filled cache
    takes_encoder_mask: bool = True


_T5, _BART = Family("relative"), Family("table")
_LIKE_BART = (
    "bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "blenderbot-small", "plbart", "bigbird_pegasus",
)  # fmt: skip
FAMILIES = {
    **dict.fromkeys(("t5", "mt5", "longt5"), _T5),
    "umt5": Family("relative", views_decoder_batch=True),
    **dict.fromkeys(_LIKE_BART, _BART),
    "encoder-decoder": Family("argument"),
    "whisper": Family("table", views_decoder_batch=True, takes_encoder_mask=False),
}


def family_of(model: nn.Module) -> Family:
    """The family of an encoder-decoder model that uses transformers' attention interface.

    Raises:
        ValueError: the model is of another family; the message lists the supported ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in FAMILIES and any(cross_attentions(model)):
        return FAMILIES[model_type]
    name = f"model_type {model_type!r}" if model_type else f"a {type(model).__name__}"
    detail = " without a known cross-attention" if model_type in FAMILIES else ""
    raise ValueError(f"pid: {name}{detail} is not supported; supported are {', '.join(FAMILIES)}")


def cross_attentions(model: nn.Module):
    """The cross-attention modules in layer order."""
    return (module for name, module in model.named_modules() if name.endswith(CROSS_ATTENTION_NAMES))


def keys_and_values(attention: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (b, H, n, D) of (b, n, d) encoder states, as the module would put them into its cache."""
    names = ("key_value_proj_dim", "head_dim", "attention_head_size")
    width = next(getattr(attention, name) for name in names if hasattr(attention, name))
    shape = (*states.shape[:2], -1, width)

    def project(*names):
        layer = next(getattr(attention, a) for a in names if hasattr(attention, a))
        return layer(states).view(shape).transpose(1, 2)

    return project("k", "k_proj", "key"), project("v", "v_proj", "value")


def positions_of(mask: Tensor, tokens: int) -> Tensor:
    """Positions (N, t) of the last ``tokens`` columns, not counting padding, from the decoder's mask.

    ``mask`` is (N, length) with ones at tokens, or the (N, 1, t, length) mask that transformers derives from it for a
    static cache.
    """
    if mask.ndim == 2:
        positions = mask.long().cumsum(1)[:, -tokens:] - 1
    else:
        visible = mask if mask.dtype == torch.bool else mask == 0
        positions = visible[:, 0].sum(-1) - 1
    return positions.clamp_min(0)


def look_up_positions(table: nn.Module, positions: Tensor) -> Tensor:
    """Rows (N, t, d) of a decoder's ``embed_positions`` for (N, t) positions that start at 0.

    The module does the lookup itself, because offloaded weights are on the device only during its forward.
    """
    if hasattr(table, "weights"):  # M2M100: a buffer whose first row is the padding's
        return table.weights[positions + table.padding_idx + 1]
    flat = positions.flatten()
    return table(flat, position_ids=flat).view(*positions.shape, -1)


def max_positions(model: nn.Module) -> int | None:
    """The number of positions of the decoder; None without a limit."""
    family = FAMILIES[model.config.model_type]
    if family.positions == "argument":
        return model.decoder.config.max_position_embeddings
    table = getattr(model.get_decoder(), "embed_positions", None)
    if family.positions == "relative" or hasattr(table, "weights"):  # the latter grows
        return None
    return table.weight.shape[0] - getattr(table, "offset", 0)
