"""Caches with fixed shapes and addresses, so that a compiled decoding step is captured once and replayed by later
calls.

A CUDA graph belongs to shapes and addresses. ``generate`` with ``cache_implementation="static"`` compiles the decoding
step, but makes new caches in every call. Here sizes are rounded up to buckets, and the caches of a finished call serve
the next one in its bucket: its encoder states are written over the old keys and values. Streams are padded with copies
of the last one; key lengths and the input of every stream are inputs of the graph.
"""

import threading
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_outputs import BaseModelOutput

from ..hf.names import cache_of
from . import families, streams
from .cache import SharedEncoderDecoderCache

KEPT = 8  # free caches per model; beyond that, the one that was used longest ago is dropped
KEYS, STREAMS, TOKENS = 64, 8, 64  # sizes are rounded up to multiples of these or more


def rounded_up(size: int, step: int) -> int:
    """``size`` rounded up to a multiple of ``step``, or of a quarter of the power of two below it if that is more."""
    step = max(step, 1 << (size.bit_length() - 3) if size >= 8 else 1)
    return -(-size // step) * step


class Bucket(NamedTuple):
    """The shapes of a decoding step."""

    inputs: int  # b
    keys: int  # n of cross-attention
    streams: int  # N
    tokens: int  # capacity of self-attention
    dtype: torch.dtype  # of keys and values
    device: torch.device


class FixedLayer(StaticLayer):
    """A static layer that beams reorder in place. transformers' own gets new tensors, at new addresses."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            for x in (self.keys, self.values):
                x.copy_(x.index_select(0, beam_idx))


class Buffers:
    """The memory of one call at a time."""

    def __init__(self, bucket: Bucket, layers: int):
        self.bucket = bucket
        self.self_attention = [FixedLayer(bucket.tokens) for _ in range(layers)]
        self.cross_attention = [FixedLayer(bucket.keys) for _ in range(layers)]
        vectors = 2 * bucket.inputs + 1 + bucket.streams  # as streams.pack
        self.packed = torch.zeros(1, 1, 1, vectors, dtype=torch.int64, device=bucket.device)
        torch._dynamo.mark_static_address(self.packed)

    def fill(self, model: torch.nn.Module, states: Tensor, mask: Tensor | None, num_streams: int) -> None:
        """Writes keys and values of (b, n, d) encoder states, their lengths, and the input of every stream."""
        inputs, n = states.shape[:2]
        for layer in self.self_attention:
            layer.reset()
        projection = getattr(model, "enc_to_dec_proj", None)
        projected = states if projection is None else projection(states)
        for layer, attention in zip(self.cross_attention, families.cross_attentions(model)):
            new = families.keys_and_values(attention, projected)
            if not layer.is_initialized:
                layer.lazy_initialization(*new)
            for memory, x in zip((layer.keys, layer.values), new):
                memory[:, :, :n] = x
                memory[:, :, n:] = 0
            layer.cumulative_length.fill_(n)
        lengths = streams.unpack(mask, inputs)[0]
        index = streams.index_of(mask, inputs, num_streams)
        if lengths is None:
            lengths = torch.full((inputs,), n, device=self.packed.device)
        rows = torch.arange(self.bucket.streams, device=self.packed.device).clamp_max(num_streams - 1)
        self.packed.copy_(streams.pack(lengths, index[rows]))


class StaticCaches:
    """The free buffers of one model. Copies and pickles of the model start without any."""

    def __init__(self):
        self._free: list[Buffers] = []  # the longest unused first
        self._lock = threading.Lock()

    def __reduce__(self):
        return StaticCaches, ()

    def take(self, bucket: Bucket, layers: int) -> Buffers:
        with self._lock:
            for buffers in reversed(self._free):
                if buffers.bucket == bucket:
                    self._free.remove(buffers)
                    return buffers
        return Buffers(bucket, layers)

    def give_back(self, buffers: Buffers) -> None:
        with self._lock:
            self._free = [*self._free, buffers][-KEPT:]


class FixedCache(SharedEncoderDecoderCache):
    """The cache of one call, on buffers that it borrows."""

    def __init__(
        self,
        caches: StaticCaches,
        buffers: Buffers,
        states: Tensor,  # (b, n, d), of the encoder
        tokens: int,  # the capacity that the caller asked for
        config: GenerationConfig,
        **kwargs,
    ):
        super().__init__(Cache(layers=buffers.self_attention), Cache(layers=buffers.cross_attention), **kwargs)
        self.is_updated = dict.fromkeys(range(len(buffers.cross_attention)), True)
        self.keys, self.tokens = states.shape[1], tokens
        self.packed = buffers.packed
        self.beams, self.compile_config = (config.num_beams or 1) > 1, config.compile_config
        # keys and values are in the cache: a decoder reads the batch size of these states at most
        self.encoder_outputs = BaseModelOutput(last_hidden_state=states[:, :1].contiguous())
        rows = torch.arange(buffers.bucket.streams, device=states.device)
        self.padding = rows.clamp_max(self.num_streams - 1)  # the stream in every row of a step
        self._buffers, self._caches = buffers, caches

    def release(self) -> None:
        """Lets another call have the buffers. The cache must not be read any more."""
        self._caches.give_back(self._buffers)

    def reorder_cache(self, beam_idx: Tensor):
        rows = torch.arange(self.num_streams, self.padding.shape[0], device=beam_idx.device)
        super().reorder_cache(torch.cat([beam_idx, rows]))

    def padded(self, inputs: dict) -> dict:
        """The arguments of a forward with a row for every stream of the bucket."""
        inputs = {
            k: v.index_select(0, self.padding) if k.startswith("decoder_") and torch.is_tensor(v) else v
            for k, v in inputs.items()
        }
        inputs["encoder_outputs"] = self.encoder_outputs
        if self.left_padded:
            inputs["attention_mask"] = self.packed
        return inputs

    def cut(self, output) -> None:
        """Removes the padding from the output of a forward."""
        output["logits"] = output["logits"][: self.num_streams]
        widths = {"decoder_attentions": self.tokens, "cross_attentions": self.keys, "decoder_hidden_states": None}
        for name, width in widths.items():
            if output.get(name) is not None:
                output[name] = tuple(x[: self.num_streams, ..., :width] for x in output[name])


def fixed(
    model: torch.nn.Module, caches: StaticCaches, model_kwargs: dict, num_streams: int, config: GenerationConfig
) -> FixedCache:
    """The cache of a call in place of the static one in ``model_kwargs``."""
    states, cache = model_kwargs["encoder_outputs"][0], cache_of(model_kwargs)
    inputs, n, tokens = *states.shape[:2], cache.get_max_length()
    masked = families.family_of(model).takes_encoder_mask
    # without a mask, key lengths and the input of each stream would not reach the decoder
    keys, rows = (rounded_up(n, KEYS), rounded_up(num_streams, STREAMS)) if masked else (n, num_streams)
    device = states.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else states.dtype
    bucket = Bucket(inputs, keys, rows, rounded_up(tokens, TOKENS), dtype, device)
    buffers = caches.take(bucket, len(cache))
    buffers.fill(model, states, model_kwargs.get("attention_mask"), num_streams)
    return FixedCache(caches, buffers, states, tokens, config, num_streams=num_streams, left_padded=masked)
