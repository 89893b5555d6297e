"""``generate`` of an adapted model."""

import inspect

import torch

from ..class_swap import Swapped

# with these, transformers (in 5.17 at least) takes input_ids for all that a causal model has seen
_COUNT_INPUT_IDS = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")
_EMBEDS_BY_ITSELF = ("florence2",)  # generate puts embeddings beside those that it is given


class DePTGenerationMixin(Swapped):
    """Comes before the model's own class.

    The input is embedded once, prompt included, and goes in as ``inputs_embeds``; every token of a causal model that follows gets the
    update of its position, so that generating equals reading the whole sequence at once, as in training.
    """

    def generate(self, inputs=None, generation_config=None, **kwargs):
        hooks = self.dept_hooks
        if inputs is not None:
            kwargs["input_ids"] = inputs
        given = any(kwargs.get(name) is not None for name in ("input_ids", "inputs_embeds"))
        if not given or not hooks.layer.is_active() or kwargs.get("encoder_outputs") is not None:
            return super().generate(generation_config=generation_config, **kwargs)
        takes_embeddings = hooks.encoder_decoder or "inputs_embeds" in inspect.signature(super().prepare_inputs_for_generation).parameters
        if not takes_embeddings or self.config.model_type in _EMBEDS_BY_ITSELF:
            raise ValueError(f"DePT: {type(self).__name__} cannot generate from inputs_embeds, which the prompt needs")
        settings = generation_config or self.generation_config
        refused = [k for k in _COUNT_INPUT_IDS if not hooks.encoder_decoder and kwargs.get(k, getattr(settings, k, None)) is not None]
        if refused:
            raise ValueError(f"DePT: generate of {type(self).__name__} cannot take {refused}: transformers would not count the prompt's columns")
        if not hooks.encoder_decoder and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = _mask_of(kwargs, settings)
        with torch.no_grad(), hooks.generating(kwargs) as widened:
            return super().generate(generation_config=generation_config, **widened)

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, **kwargs):
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        hooks = self.dept_hooks
        if hooks.generation is None or hooks.encoder_decoder or model_inputs.get("inputs_embeds") is not None:
            return model_inputs
        embeddings = hooks.next_embeddings(model_inputs["input_ids"], input_ids.shape[1])
        return {**model_inputs, "input_ids": None, "inputs_embeds": embeddings}

    def _prepare_generated_length(self, *args, model_input_name, **kwargs):
        """``max_length`` counts tokens, as for the model without prompts: transformers would subtract the columns of ``inputs_embeds``."""
        if self.dept_hooks.generation is not None and not self.dept_hooks.generation.unseen:
            model_input_name = "input_ids"
        return super()._prepare_generated_length(*args, model_input_name=model_input_name, **kwargs)


def _mask_of(kwargs, generation_config):
    """What transformers takes where no mask is given: the padding token is padding, unless it ends texts as well."""
    ids = kwargs.get("input_ids")
    if ids is None:
        return torch.ones(kwargs["inputs_embeds"].shape[:2], dtype=torch.long, device=kwargs["inputs_embeds"].device)
    pad, eos = (kwargs.get(name, getattr(generation_config, name)) for name in ("pad_token_id", "eos_token_id"))
    ends = eos if isinstance(eos, list) else [eos]
    return (ids != pad).long() if pad is not None and pad not in ends else torch.ones_like(ids)
