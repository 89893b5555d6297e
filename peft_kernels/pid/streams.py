"""Key lengths and the input of each decoder stream, packed so that they pass through a stock model.

Decoders hand their ``encoder_attention_mask`` to every cross-attention, and a four-dimensional mask passes through
unchanged. It carries small int64 vectors: (1, 1, 1, b) key lengths, followed, if streams are ragged, by the input of
each stream, (N,), and the first stream of each input, (b + 1,). No mask is built, and an argument, unlike state on a
module, is still correct when a checkpointed layer runs again.
"""

import torch
from torch import Tensor


def pack(key_lengths: Tensor, encoder_index: Tensor | None) -> Tensor:
    if encoder_index is None:
        return key_lengths.to(torch.int64)[None, None, None]
    inputs = torch.arange(key_lengths.shape[0] + 1, dtype=encoder_index.dtype, device=encoder_index.device)
    vectors = key_lengths, encoder_index, torch.searchsorted(encoder_index, inputs)
    return torch.cat([x.to(torch.int64) for x in vectors])[None, None, None]


def is_packed(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int64 and mask.ndim == 4


def unpack(mask: Tensor | None, inputs: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The key lengths, the encoder index and the first stream of each input; each is None if the mask has none.

    A mask that is not packed was created by transformers in place of None, under ``torch.compile``: every key is
    visible.
    """
    if not is_packed(mask):
        return None, None, None
    flat = mask.view(-1)
    streams = flat.shape[0] - 2 * inputs - 1
    return flat.split((inputs, streams, inputs + 1)) if streams > 0 else (flat, None, None)


def prepare(
    states: Tensor, mask: Tensor | None, streams: int, encoder_index: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The encoder states with every input's keys in front, and the packed lengths and index, of checked streams.

    Cross-attention has no positions, so keys may be reordered: with left padding or holes in the mask they are gathered
    to the front, which is exact. This synchronizes with a GPU, so it runs once per forward pass or generation, never
    per layer or step.

    Args:
        states: (b, n, d), the encoder's last hidden states.
        mask: (b, n), nonzero at keys, or None.
        streams: N, the number of decoder rows.
        encoder_index: (N,) or None.

    Raises:
        ValueError: N is not a multiple of b and there is no index; the index decreases or is out of range; or the mask
            has another shape.
    """
    inputs, n = states.shape[:2]
    if encoder_index is None:
        if streams % inputs:
            raise ValueError(
                f"the decoder's rows must be a multiple of the encoder's inputs, got {streams} rows for {inputs}"
                " inputs: pass encoder_index, the input of every row, where inputs have different numbers of streams"
            )
    else:
        encoder_index = _checked(encoder_index.to(states.device), inputs, streams)
    if mask is None:
        full = torch.full((inputs,), n, device=states.device)
        return states, None if encoder_index is None else pack(full, encoder_index)
    if mask.shape != (inputs, n):
        raise ValueError(f"attention_mask must be ({inputs}, {n}), one row per encoder input, got {tuple(mask.shape)}")
    visible = mask.to(states.device) != 0
    lengths = visible.sum(1)
    positions = torch.arange(n, device=states.device)
    if not bool((visible == (positions < lengths[:, None])).all()):
        order = torch.argsort(~visible, dim=1, stable=True)
        states = states.gather(1, order[..., None].expand_as(states))
    if encoder_index is None and bool((lengths == n).all()):
        return states, None
    return states, pack(lengths, encoder_index)


def index_of(mask: Tensor | None, inputs: int, streams: int) -> Tensor:
    """The input of every stream, (N,); ``mask`` is the packed mask from ``prepare``."""
    index = unpack(mask, inputs)[1]
    if index is not None:
        return index
    return torch.arange(inputs, device=None if mask is None else mask.device).repeat_interleave(streams // inputs)


def repeated(states: Tensor, mask: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor | None]:
    """Expand the result of ``prepare`` for stock models: (N, n, d) states and an (N, n) mask, one row per stream."""
    lengths = unpack(mask, states.shape[0])[0]
    index = index.to(states.device)
    if lengths is not None:
        mask = (torch.arange(states.shape[1], device=states.device) < lengths[index][:, None]).long()
    return states[index], mask


def _checked(index: Tensor, inputs: int, streams: int) -> Tensor:
    if index.shape != (streams,) or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"encoder_index must be ({streams},) integers, one per row of the decoder, got {tuple(index.shape)}"
            f" {index.dtype}"
        )
    if bool((index[1:] < index[:-1]).any()):
        raise ValueError(f"encoder_index must not decrease, got {index.tolist()}")
    if streams and not 0 <= int(index[0]) <= int(index[-1]) < inputs:
        raise ValueError(
            f"encoder_index must lie in [0, {inputs}), got values from {int(index[0])} to {int(index[-1])}"
        )
    return index
