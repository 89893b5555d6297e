"""Overrides of transformers' ``generate`` for streams that share an encoder input."""

import copy

import torch
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache, StaticCache, StaticLayer
from transformers.modeling_outputs import BaseModelOutput

from ..hf.class_swap import Swapped
from ..hf.names import CACHE, cache_of, has_row_adapters
from . import attention, packing, streams
from .cache import GrowingLayer, SharedEncoderDecoderCache, filled_cache
from .families import family_of
from .static import FixedCache, fixed


def drops_finished(asked: bool | None, device: torch.device) -> bool:
    """Whether finished streams are dropped; by default not on a GPU, which the check would make wait."""
    return device.type == "cpu" if asked is None else asked


class PiDGenerationMixin(Swapped):
    """The mixin that ``pid.enable`` puts in front of a model's class.

    Names and signatures are those of ``GenerationMixin``.
    """

    def generate(self, *args, **kwargs):
        borrowed, output = self.pid_hooks.borrowed, None
        outer = borrowed.get()  # of the call that this one is nested in
        borrowed.set(None)
        try:
            with packing.packed_linears(self):
                output = super().generate(*args, **kwargs)
            return output
        finally:
            cache = borrowed.get()
            borrowed.set(outer)
            if cache is not None and not (isinstance(output, dict) and cache_of(output) is cache):
                cache.release()  # a caller that gets the cache keeps it

    def __call__(self, *args, **kwargs):
        """Run a step of beam search compiled: transformers does so for greedy search and sampling alone."""
        cache = None if torch.compiler.is_compiling() else cache_of(kwargs)
        if isinstance(cache, FixedCache) and cache.beams and not self.pid_hooks.last_only.get():
            return self.get_compiled_call(cache.compile_config)(*args, **kwargs)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.pid_hooks.encoder_index.set(None)

    def get_compiled_call(self, compile_config):
        """Drop a call that was compiled for another model: transformers keeps it here, and a deep copy keeps that of
        its original.
        """
        function = getattr(vars(self).get("_compiled_call"), "_torchdynamo_orig_callable", None)
        if getattr(function, "__self__", self) is not self:
            del self._compiled_call
        return super().get_compiled_call(compile_config)

    def _validate_model_kwargs(self, model_kwargs):
        super()._validate_model_kwargs(
            {k: v for k, v in model_kwargs.items() if k not in ("encoder_index", "left_padded_prompts")}
        )

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size, model_input_name, model_kwargs, decoder_start_token_id, device=None
    ):
        ids = model_kwargs.get("decoder_input_ids")
        if ids is not None and ids.shape[0] != batch_size:
            batch_size = ids.shape[0]
            if decoder_start_token_id.ndim == 1 and decoder_start_token_id.shape[0] != batch_size:
                decoder_start_token_id = decoder_start_token_id[:1].expand(batch_size)
        return super()._prepare_decoder_input_ids_for_generation(
            batch_size, model_input_name, model_kwargs, decoder_start_token_id, device
        )

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat the per-stream inputs; keep one row per input of the encoder's output and mask."""
        encoder_outputs, mask = model_kwargs.pop("encoder_outputs"), model_kwargs.pop("attention_mask", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, False, input_ids, **model_kwargs)
        encoder_index = model_kwargs.pop("encoder_index", None)
        states, rows = encoder_outputs[0], input_ids.shape[0]
        if not family_of(self).takes_encoder_mask:
            mask = None  # Whisper's mask is over input frames, which its decoder does not see
        attention.adopt(self.pid_hooks.configs)
        if encoder_index is not None or rows != states.shape[0]:
            states, mask = streams.prepare(states, mask, rows, encoder_index)
            model_kwargs["shared_streams"] = rows
            if has_row_adapters(self) or not attention.is_adopted(self.pid_hooks.configs):
                model_kwargs["index_of_own_keys"] = index = streams.index_of(mask, states.shape[0], rows)
                states, mask = streams.repeated(states, mask, index)
            if states is not encoder_outputs[0]:
                encoder_outputs = (
                    copy.copy(encoder_outputs) if isinstance(encoder_outputs, BaseModelOutput) else BaseModelOutput()
                )
                encoder_outputs["last_hidden_state"] = states
        return input_ids, {**model_kwargs, "encoder_outputs": encoder_outputs, "attention_mask": mask}

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs
    ):
        """Fill the cross-attention cache with one row per input."""
        num_streams = model_kwargs.pop("shared_streams", None)  # N; None: as many as inputs
        # (N,), the input of each stream, if streams cannot share
        own_keys = model_kwargs.pop("index_of_own_keys", None)
        left_padded = model_kwargs.pop("left_padded_prompts", False)
        expand_size = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if num_streams:
            batch_size = num_streams // expand_size
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs
        )
        cache = cache_of(model_kwargs)
        if not (num_streams or left_padded) or (cache is None and not left_padded):
            return
        if type(cache) is not EncoderDecoderCache or any(cache.is_updated.values()):
            raise ValueError(
                "pid: streams that share an input need an empty key/value cache of transformers' own,"
                f" got {'use_cache=False' if cache is None else type(cache).__name__}"
            )
        if (
            num_streams
            and own_keys is None
            and not cache.self_attention_cache.offloading
            and all(type(layer) is StaticLayer for layer in cache.self_attention_cache.layers)
            and self._valid_auto_compile_criteria(model_kwargs, generation_config)
        ):
            model_kwargs[CACHE] = fixed(self, self.pid_static_caches, model_kwargs, num_streams, generation_config)
            self.pid_hooks.borrowed.set(model_kwargs[CACHE])
            return
        states = model_kwargs["encoder_outputs"][0]
        if getattr(self, "enc_to_dec_proj", None) is not None:
            states = self.enc_to_dec_proj(states)
        if (generation_config.num_beams or 1) == 1:  # reordering beams copies the whole cache at every step anyway
            layers = cache.self_attention_cache.layers
            layers[:] = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in layers]
        outputs_of_steps = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        can_drop_finished = (
            num_streams
            and own_keys is None
            and drops_finished(self.pid_drop_finished, states.device)
            and family_of(self).takes_encoder_mask
            and not isinstance(cache.self_attention_cache, StaticCache)
            and (generation_config.num_beams or 1) == 1
            and not any(getattr(generation_config, name) for name in outputs_of_steps)
        )
        model_kwargs[CACHE] = filled_cache(
            self,
            states,
            cache.self_attention_cache,
            num_streams=num_streams or states.shape[0],
            left_padded=left_padded,
            eos_token_ids=generation_config._eos_token_tensor if can_drop_finished else None,
            encoder_index=own_keys,
        )

    def _get_logits_processor(self, generation_config, *args, encoder_input_ids=None, model_kwargs=None, **kwargs):
        """Give processors that compare with the encoder's input one row of it per stream, not counting beams."""
        cache = cache_of(model_kwargs or {})
        if isinstance(cache, SharedEncoderDecoderCache) and encoder_input_ids is not None:
            index = cache.encoder_index(model_kwargs["attention_mask"])[:: generation_config.num_beams or 1]
            encoder_input_ids = encoder_input_ids[index]
        return super()._get_logits_processor(
            generation_config, *args, encoder_input_ids=encoder_input_ids, model_kwargs=model_kwargs, **kwargs
        )

    def _prefill(self, *args, **kwargs):
        """Run the first pass over the prompts, with logits of the last position only."""
        last_only = self.pid_hooks.last_only
        last_only.set(True)
        try:
            return super()._prefill(*args, **kwargs)
        finally:
            last_only.set(None)

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        # PEFT's prompt tuning keeps a reference to this method after disable
        if not isinstance(self, PiDGenerationMixin):
            return type(self).prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache = cache_of(inputs)
        if not isinstance(cache, SharedEncoderDecoderCache):
            return inputs
        if isinstance(cache, FixedCache):
            return cache.padded(inputs)
        cache.drop_finished(input_ids)
        if cache.rows is not None:
            inputs = {
                k: v[cache.rows] if k.startswith("decoder_") and torch.is_tensor(v) else v for k, v in inputs.items()
            }
            inputs["attention_mask"] = cache.mask_of_rows(inputs["attention_mask"])
        return inputs

    def _update_model_kwargs_for_generation(self, outputs, *args, **kwargs):
        cache = outputs.get(CACHE)
        if isinstance(cache, FixedCache):
            cache.cut(outputs)
        elif isinstance(cache, SharedEncoderDecoderCache) and cache.rows is not None:
            outputs.logits = cache.for_all_streams(outputs.logits)
        return super()._update_model_kwargs_for_generation(outputs, *args, **kwargs)
