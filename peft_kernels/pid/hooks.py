"""Forward hooks that let a decoder take more rows than its encoder."""

from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..hf.call_state import CallState
from ..hf.names import CACHE, cache_of
from . import attention, streams
from .cache import SharedEncoderDecoderCache, filled_cache
from .families import family_of, look_up_positions, positions_of


class DecoderHooks:
    """The hooks of one model, as bound methods, so that a deep copy of the model gets its own."""

    def __init__(self, model: nn.Module):
        self.model, self.family, self.configs = model, family_of(model), attention.configs_of(model)
        self.encoder_index = CallState()  # from the model's hook to the decoder's; the model's __call__ resets it
        self.positions = CallState()  # from the decoder's hook to the hook of embed_positions
        # True in the prefill of ``generate``, which reads only the logits of the last position
        self.last_only = CallState()
        self.borrowed = CallState()  # the cache of ``generate`` whose buffers another call may have afterwards
        decoder = model.get_decoder()
        self.handles = [
            model.register_forward_pre_hook(self.before_model, with_kwargs=True),
            decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
            decoder.base_model.register_forward_hook(self.after_decoder),
        ]
        if self.family.positions == "table":
            self.handles.append(decoder.embed_positions.register_forward_hook(self.after_positions))
        biased = [m for m in model.modules() if getattr(m, "has_relative_attention_bias", False)]
        self.handles += [m.register_forward_hook(self.after_biased_attention) for m in biased]

    def after_biased_attention(self, attention, args, output):
        """Make T5's position bias contiguous: the first layer transposes it, and sdpa would copy it in every layer."""
        if len(output) < 3:  # UMT5 has one bias per layer and does not return it
            return None
        out, bias, *rest = output
        return out, bias if bias is None else bias.contiguous(), *rest

    def before_model(self, model, args, kwargs):
        """Take ``encoder_index`` from the arguments: some models pass it to their encoder too, LongT5 to no module."""
        attention.adopt(self.configs)
        self.encoder_index.set(kwargs.pop("encoder_index", None))
        return args, kwargs

    def before_decoder(self, decoder, args, kwargs):
        attention.adopt(self.configs)
        self.positions.set(None)
        index = self.encoder_index.get()
        cache, states = cache_of(kwargs), kwargs.get("encoder_hidden_states")
        if isinstance(cache, SharedEncoderDecoderCache):
            return args, self.with_positions(args, kwargs) if cache.left_padded else kwargs
        encoder_index = kwargs.pop("encoder_index", index)
        tokens = _decoder_tokens(args, kwargs)
        if states is None or tokens is None or (tokens.shape[0] == states.shape[0] and encoder_index is None):
            return args, kwargs
        rows, mask = tokens.shape[0], kwargs.get("encoder_attention_mask")
        if not self.family.takes_encoder_mask:
            mask = None
        if not streams.is_packed(mask):
            states, mask = streams.prepare(states, mask, rows, encoder_index)
        if _is_prefix(cache) and _rows(cache) == states.shape[0] != rows:  # PEFT makes one row per input
            cache.self_attention_cache.batch_select_indices(streams.index_of(mask, states.shape[0], rows))
        unmasked = mask is None or self.family.takes_encoder_mask
        if unmasked and attention.is_adopted(self.configs) and not _keys_per_row(cache, states.shape[0]):
            return args, kwargs | self.shared(decoder, states, mask, rows, cache, kwargs.get("use_cache"))
        return args, kwargs | self.repeated(states, mask, rows)

    def shared(self, decoder, states, mask, rows: int, cache, use_cache: bool | None) -> dict:
        """The decoder's arguments where its rows share keys and values."""
        arguments = {"encoder_hidden_states": states}
        if self.family.takes_encoder_mask:
            arguments["encoder_attention_mask"] = mask
        if self.family.views_decoder_batch and cache is None:
            if decoder.training and getattr(decoder, "gradient_checkpointing", False):
                raise ValueError(
                    f"pid: model_type {self.model.config.model_type!r} shares keys and values through its cache, which"
                    " gradient checkpointing turns off"
                )
            returned = decoder.config.use_cache if use_cache is None else use_cache
            arguments[CACHE] = filled_cache(self.model, states, DynamicCache(), num_streams=rows, returned=returned)
            arguments["use_cache"] = True
        elif _is_prefix(cache) and rows != states.shape[0]:  # beams would reorder all of a stock cache
            arguments[CACHE] = filled_cache(self.model, states, cache.self_attention_cache, num_streams=rows)
        return arguments

    def repeated(self, states, mask, rows: int) -> dict:
        """The decoder's arguments where rows cannot share keys: the cache has a prefix, or attention is not ours."""
        states, mask = streams.repeated(states, mask, streams.index_of(mask, states.shape[0], rows))
        arguments = {"encoder_hidden_states": states}
        if self.family.takes_encoder_mask:
            arguments["encoder_attention_mask"] = mask
        return arguments

    def after_decoder(self, decoder, args, output):
        self.positions.set(None)
        if not hasattr(output, "last_hidden_state"):
            return None
        changes = {}
        cache = output.get(CACHE)
        if isinstance(cache, SharedEncoderDecoderCache) and not cache.returned:  # the caller passed use_cache=False
            changes[CACHE] = None
        if self.last_only.get():
            changes["last_hidden_state"] = output.last_hidden_state[:, -1:]
        return type(output)(**{k: v for k, v in {**output, **changes}.items() if v is not None}) if changes else None

    def with_positions(self, args, kwargs):
        """``kwargs`` with positions that do not count left padding."""
        tokens, mask = _decoder_tokens(args, kwargs), kwargs.get("attention_mask")
        if mask is None:  # transformers makes none where nothing is padded
            return kwargs
        if self.family.positions == "argument":
            return {**kwargs, "position_ids": positions_of(mask, tokens.shape[1])}
        if self.family.positions == "table":
            self.positions.set(positions_of(mask, tokens.shape[1]))
        return kwargs

    def after_positions(self, table, args, output):
        positions = self.positions.get()
        self.positions.set(None)  # look_up_positions calls the table again
        return None if positions is None else look_up_positions(table, positions)


def _decoder_tokens(args, kwargs):
    tokens = kwargs.get("input_ids", args[0] if args else None)
    return tokens if tokens is not None else kwargs.get("inputs_embeds")


def _keys_per_row(cache, inputs: int) -> bool:
    """Whether a stock cache holds cross-attention keys that belong to rows instead of inputs, or to a prefix."""
    if not isinstance(cache, EncoderDecoderCache) or not cache.cross_attention_cache.get_seq_length():
        return False
    return _rows(cache.cross_attention_cache) != inputs or not all(cache.is_updated.values())


def _is_prefix(cache) -> bool:
    """Whether a stock cache is that of PEFT's prefix tuning before the first step: it has no cross-attention keys."""
    return (
        isinstance(cache, EncoderDecoderCache)
        and cache.get_seq_length() > 0
        and not cache.cross_attention_cache.get_seq_length()
    )


def _rows(cache) -> int | None:
    """The number of rows of a cache; None while it is empty."""
    layer = getattr(cache, "self_attention_cache", cache).layers[0] if len(cache) else None
    return layer.keys.shape[0] if layer is not None and layer.is_initialized else None
