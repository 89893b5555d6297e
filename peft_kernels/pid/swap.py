"""``enable`` and ``disable``: the swap, and all that is put onto a model by it."""

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from . import packing, streams
from .attention import NAMES
from .cache import SharedEncoderDecoderCache, filled
from .families import cross_attentions, family_of, look_up_positions, positions_of
from .generation import PiDGenerationMixin


class _DecoderHooks:
    """Forward hooks on a decoder; bound methods, so that a deep copy of the model gets hooks of its own."""

    def __init__(self, model: nn.Module):
        self.model, self.family = model, family_of(model)
        # each from one hook to the next within one forward: the model's to the decoder's, the decoder's to its embed_positions'
        self.encoder_index: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        decoder = model.get_decoder()
        self.handles = [
            model.register_forward_pre_hook(self.before_model, with_kwargs=True),
            decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
        ]
        if self.family.views_decoder_batch:
            self.handles.append(decoder.register_forward_hook(self.after_decoder))
        if self.family.positions == "table":
            self.handles.append(decoder.embed_positions.register_forward_hook(self.after_positions))
        biased = [m for m in model.modules() if getattr(m, "has_relative_attention_bias", False)]
        self.handles += [m.register_forward_hook(self.after_biased_attention) for m in biased]

    def after_biased_attention(self, attention, args, output):
        """T5 hands its position bias from the first layer to the others, transposed, and sdpa would copy it anew in each."""
        if len(output) < 3:  # UMT5 has one per layer and keeps it
            return None
        out, bias, *rest = output
        return out, bias if bias is None else bias.contiguous(), *rest

    def before_model(self, model, args, kwargs):
        """Some models would hand the index to their encoder too, LongT5 to nobody."""
        self.encoder_index = kwargs.pop("encoder_index", None)
        return args, kwargs

    def before_decoder(self, decoder, args, kwargs):
        index, self.encoder_index = self.encoder_index, None
        cache, states = kwargs.get("past_key_values"), kwargs.get("encoder_hidden_states")
        if isinstance(cache, SharedEncoderDecoderCache):
            if cache.left_padded:
                return args, self.place(args, kwargs)
            return None
        encoder_index = kwargs.pop("encoder_index", index)
        tokens = _decoder_tokens(args, kwargs)
        if states is None or tokens is None or (tokens.shape[0] == states.shape[0] and encoder_index is None):
            return args, kwargs
        mask = kwargs.get("encoder_attention_mask")
        if not streams.is_packed(mask):
            states, mask = streams.prepare(states, mask, tokens.shape[0], encoder_index)
        kwargs["encoder_hidden_states"] = states
        if self.family.takes_encoder_mask:
            kwargs["encoder_attention_mask"] = mask
        elif mask is not None:
            raise ValueError(
                f"pid: the decoder of model_type {self.model.config.model_type!r} takes no encoder mask: every input needs equally many streams"
            )
        if self.family.views_decoder_batch and cache is None:
            if decoder.training and getattr(decoder, "gradient_checkpointing", False):
                raise ValueError(
                    f"pid: model_type {self.model.config.model_type!r} shares keys and values through its cache,"
                    " which gradient checkpointing turns off"
                )
            asked = kwargs.get("use_cache")
            returned = decoder.config.use_cache if asked is None else asked
            kwargs["past_key_values"] = filled(self.model, states, DynamicCache(), num_streams=tokens.shape[0], returned=returned)
            kwargs["use_cache"] = True
        return args, kwargs

    def after_decoder(self, decoder, args, output):
        """Take back a cache that nobody asked for."""
        cache = getattr(output, "past_key_values", None)
        if isinstance(cache, SharedEncoderDecoderCache) and not cache.returned:
            return type(output)(**{k: v for k, v in output.items() if k != "past_key_values"})
        return None

    def place(self, args, kwargs):
        tokens, mask = _decoder_tokens(args, kwargs), kwargs.get("attention_mask")
        if self.family.positions != "relative":
            positions = positions_of(mask, tokens.shape[1])
            if self.family.positions == "argument":
                return {**kwargs, "position_ids": positions}
            self.positions = positions
        return kwargs

    def after_positions(self, table, args, output):
        positions, self.positions = self.positions, None
        return None if positions is None else look_up_positions(table, positions)


def _decoder_tokens(args, kwargs):
    tokens = kwargs.get("input_ids", args[0] if args else None)
    return tokens if tokens is not None else kwargs.get("inputs_embeds")


def enable(model: nn.Module, *, pack_weights: bool = True) -> nn.Module:
    """Let the decoder streams of one encoder input share its cross-attention keys and values.

    Afterwards ``model.generate`` with beams, ``num_return_sequences`` or more decoder rows than encoder rows computes and keeps the
    keys and values of every input once, and ``model(input_ids=(b, n), labels=(N, T))`` trains N streams on b encoded inputs: streams
    [i*N/b, (i+1)*N/b) belong to input i, or those that ``encoder_index`` (N,) names. Tokens, losses and gradients are those of
    repeated encoder outputs. No module is replaced, so adapters on the projections keep working.

    Args:
        model: an encoder-decoder model of transformers, or a PEFT model around one, with "sdpa" or "eager" attention. Changed in place.
            With "eager", attention weights are available (``output_attentions=True``); "sdpa" runs our operator.
        pack_weights: on a CPU, generate with a second copy of the linear weights, packed for few rows (see pid/packing.py):
            about 1.4 times as fast, for the memory of those weights. False: plain weights.

    Returns:
        ``model``. Enabling twice changes nothing but ``pack_weights``.

    Raises:
        ValueError: a family that is not supported, or another attention implementation.
    """
    base = _base(model)
    if is_enabled(base):
        base.pid_pack_weights = pack_weights
        return model
    family_of(base)
    configs = _configs(base)
    unknown = {c._attn_implementation for c in configs} - NAMES.keys()
    if unknown:
        raise ValueError(
            f"pid.enable: attention implementations {sorted(map(str, unknown))} are not supported:"
            " first call model.set_attn_implementation('sdpa') or 'eager'"
        )
    _rename(configs, NAMES)
    for attention in cross_attentions(base):
        attention.pid_cross_attention = True
    stock = type(base)
    base.pid_hooks = _DecoderHooks(base)
    base.pid_pack_weights = pack_weights
    # the stock class's name and module, because transformers looks at both
    base.__class__ = type(stock.__name__, (PiDGenerationMixin, stock), {"__module__": stock.__module__, "__qualname__": stock.__qualname__})
    return model


def disable(model: nn.Module) -> nn.Module:
    """Undo ``enable``: the model is what it was, bit for bit. Nothing happens if it is not enabled."""
    base = _base(model)
    if not is_enabled(base):
        return model
    base.__class__ = type(base).__bases__[1]
    for handle in base.pid_hooks.handles:
        handle.remove()
    packing.forget(base)
    del base.pid_hooks, base.pid_pack_weights
    for attention in cross_attentions(base):
        del attention.pid_cross_attention
    _rename(_configs(base), {ours: stock for stock, ours in NAMES.items()})
    return model


def is_enabled(model: nn.Module) -> bool:
    return isinstance(_base(model), PiDGenerationMixin)


def _base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _configs(model):
    """Every configuration that attention modules read their implementation from, each once."""
    configs = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]
    return list({id(c): c for c in configs}.values())


def _rename(configs, names):
    for config, name in [(c, names[c._attn_implementation]) for c in configs]:  # all read first: a parent's setter reaches its parts
        config._attn_implementation = name
