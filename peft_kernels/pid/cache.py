"""A cache with one cross-attention row per encoder input instead of one per stream."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from . import families, streams

CHECK_EVERY = 4  # steps between two checks for finished streams: each check synchronizes with the GPU
DROP_BELOW = 0.5  # finished streams are dropped once at most this share of the decoded streams is unfinished


class GrowingLayer(DynamicLayer):
    """A dynamic layer with spare capacity: a step writes its token in place; the stock layer copies all tokens."""

    spare_tokens = 64

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self._key_buffer = self._value_buffer = None
        self.keys, self._key_buffer = self._append(self.keys, self._key_buffer, key_states)
        self.values, self._value_buffer = self._append(self.values, self._value_buffer, value_states)
        return self.keys, self.values

    def _append(self, states: Tensor, buffer: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
        start, end = states.shape[2], states.shape[2] + new.shape[2]
        is_view = buffer is not None and states.data_ptr() == buffer.data_ptr() and states.stride() == buffer.stride()
        # the first tokens, rows were selected since the last step, or the capacity is used up
        if not is_view or end > buffer.shape[2]:
            buffer = new.new_empty((*states.shape[:2], end + self.spare_tokens, states.shape[3]))
            buffer[:, :, :start] = states
        buffer[:, :, start:end] = new
        return buffer[:, :, :end], buffer


class SharedEncoderDecoderCache(EncoderDecoderCache):
    """Self-attention keys and values of N streams, cross-attention keys and values of the b inputs they share.

    Reordering beams never touches the cross-attention part.

    Attributes:
        num_streams: N.
        left_padded: whether prompts are padded on the left, so that positions come from the decoder's mask.
        returned: whether the decoder returns the cache; False under ``use_cache=False``.
        rows: (k,) indices of the streams that are still decoded; None while all are.
    """

    def __init__(
        self,
        self_attention: Cache,
        cross_attention: Cache,
        *,
        num_streams: int,
        left_padded: bool = False,
        returned: bool = True,
        eos_token_ids: Tensor | None = None,
        encoder_index: Tensor | None = None,
    ):
        super().__init__(self_attention, cross_attention)
        self.num_streams = num_streams
        self.left_padded = left_padded
        self.returned = returned
        self.rows: Tensor | None = None
        self._eos_token_ids = eos_token_ids
        self._encoder_index = encoder_index  # (N,), set where every stream has its own keys and values
        self._prompt_length: int | None = None
        self._mask: Tensor | None = None

    def reorder_cache(self, beam_idx: Tensor):
        self.self_attention_cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int):
        self.self_attention_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor):
        self.self_attention_cache.batch_select_indices(indices)

    def drop_finished(self, input_ids: Tensor):
        """Stop decoding finished streams once most have finished; ``input_ids`` are all ids so far, (N, length)."""
        if self._prompt_length is None:
            self._prompt_length = input_ids.shape[1]
        steps = input_ids.shape[1] - self._prompt_length
        if self._eos_token_ids is None or steps == 0 or steps % CHECK_EVERY:
            return
        unfinished = ~torch.isin(input_ids[:, -steps:], self._eos_token_ids).any(1)
        if self.rows is not None:
            unfinished = unfinished[self.rows]
        keep = unfinished.nonzero().squeeze(1)
        if 0 < len(keep) <= DROP_BELOW * len(unfinished):
            self.batch_select_indices(keep)
            self.rows = keep if self.rows is None else self.rows[keep]
            self._mask = None

    def encoder_index(self, mask: Tensor | None) -> Tensor:
        """The input of every stream, (N,), from the packed lengths and indices."""
        if self._encoder_index is not None:
            return self._encoder_index
        keys = self.cross_attention_cache.layers[0].keys
        return streams.index_of(mask, keys.shape[0], self.num_streams).to(keys.device)

    def mask_of_rows(self, mask: Tensor | None) -> Tensor:
        """The packed lengths and indices of the remaining rows, from those of all streams."""
        if self._mask is None:
            inputs, _, n, _ = self.cross_attention_cache.layers[0].keys.shape
            lengths = streams.unpack(mask, inputs)[0]
            if lengths is None:
                lengths = torch.full((inputs,), n, device=self.rows.device)
            self._mask = streams.pack(lengths, self.encoder_index(mask)[self.rows])
        return self._mask

    def for_all_streams(self, logits: Tensor) -> Tensor:
        """Scatter the logits (k, ...) of the remaining rows into (N, ...); ``generate`` ignores those of the others."""
        return logits.new_zeros(self.num_streams, *logits.shape[1:]).index_copy_(0, self.rows, logits)


def filled_cache(model: torch.nn.Module, states: Tensor, self_attention: Cache, **kwargs) -> SharedEncoderDecoderCache:
    """A cache that holds the cross-attention keys and values of (b, n, d) encoder states, computed once per layer."""
    cache = SharedEncoderDecoderCache(self_attention, DynamicCache(), **kwargs)
    for layer, attention in enumerate(families.cross_attentions(model)):
        cache.cross_attention_cache.update(*families.keys_and_values(attention, states), layer)
        cache.is_updated[layer] = True
    return cache
