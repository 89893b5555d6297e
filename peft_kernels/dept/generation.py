"""``generate`` for models with a DePT adapter."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hf.class_swap import Swapped
from ..hf.names import cache_of
from .hooks import GENERATION
from .insertion import positions_of

# options under which transformers takes the cached columns for those of input_ids; None or False: off
_COUNT_INPUT_IDS = (
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "assistant_model",
    "assistant_early_exit",
    "use_mtp",
    "token_healing",
)
_EMBEDS_BY_ITSELF = ("florence2",)  # generate adds embeddings to inputs_embeds
_READ_INPUT_IDS = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}  # the options' neutral values


@dataclass
class Generation:
    """State of one ``generate`` of a causal model, passed to each step as an argument."""

    delta: Tensor  # [K, s, d]
    adapter_ids: Tensor | None  # [B]
    offsets: Tensor | None  # [B]
    unseen: int  # input columns that input_ids lack, because the input came as inputs_embeds

    def expanded(self, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Adapters and offsets for ``rows`` beams or returned sequences; the rows of one input are adjacent."""
        return tuple(
            x if x is None else x.repeat_interleave(rows // x.shape[0]) for x in (self.adapter_ids, self.offsets)
        )


class DePTGenerationMixin(Swapped):
    """The mixin that is put in front of the model's own class.

    The input and the prompt are embedded once and passed as ``inputs_embeds``. Every token that a causal model
    generates gets the update of its position, so that generation equals one forward over the whole sequence, as in
    training.
    """

    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        hooks = self.dept_hooks
        if inputs is not None and kwargs.get("input_ids") is None:
            kwargs["input_ids"], inputs = inputs, None
        names = [name for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None]
        if GENERATION not in kwargs and hooks.layer.is_active() and inputs is None:
            settings = _Settings(kwargs, generation_config, self.generation_config)
            ids = kwargs.get("input_ids") if len(names) == 1 else None
            parameters = inspect.signature(super().prepare_inputs_for_generation).parameters
            takes_embeddings = hooks.encoder_decoder or "inputs_embeds" in parameters
            if names and (not takes_embeddings or self.config.model_type in _EMBEDS_BY_ITSELF):
                raise ValueError(
                    f"DePT: {type(self).__name__} cannot generate from inputs_embeds, which the prompt needs"
                )
            if kwargs.get("encoder_outputs") is not None:
                kwargs |= hooks.encoder_mask(kwargs)
            elif hooks.encoder_decoder and len(names) == 1:
                kwargs = self._dept_encoder_inputs(kwargs)
            elif names and not hooks.encoder_decoder:
                kwargs = self._dept_causal_inputs(kwargs, settings)
            outer = hooks.generate_inputs.get()
            hooks.generate_inputs.set((ids, kwargs.get("inputs_embeds")))
            try:
                return super().generate(None, generation_config, *args, **kwargs)
            finally:
                hooks.generate_inputs.set(outer)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _get_logits_processor(self, generation_config, *args, encoder_input_ids=None, **kwargs):
        """Give processors that compare with the input its tokens; transformers would pass the embeddings instead."""
        ids, embeddings = self.dept_hooks.generate_inputs.get() or (None, None)
        if ids is not None and embeddings is not None:
            if encoder_input_ids is embeddings:
                encoder_input_ids = ids
            else:
                options = [
                    name
                    for name, neutral in _READ_INPUT_IDS.items()
                    if getattr(generation_config, name, None) not in (None, neutral)
                ]
                self._dept_refuse(options, "compare other rows than those of input_ids")
        return super()._get_logits_processor(generation_config, *args, encoder_input_ids=encoder_input_ids, **kwargs)

    @torch.no_grad()
    def _dept_encoder_inputs(self, kwargs):
        inputs, *_ = self.dept_hooks.widened(kwargs)
        return {k: v for k, v in (kwargs | inputs).items() if k != "input_ids"}

    @torch.no_grad()
    def _dept_causal_inputs(self, kwargs, settings):
        hooks, ids, embeds = self.dept_hooks, kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        options = [name for name in _COUNT_INPUT_IDS if settings.get(name) not in (None, False)]
        options += ["cache_implementation='paged'"] if settings.get("cache_implementation") == "paged" else []
        self._dept_refuse(options, "not count the prompt's columns")
        if cache_of(kwargs) is not None and cache_of(kwargs).get_seq_length():
            raise ValueError("DePT: generate must start from an empty cache, got past_key_values of an earlier input")
        if kwargs.get("attention_mask") is None and "attention_mask" in hooks.argument_names:
            kwargs["attention_mask"] = _mask_of(ids if embeds is None else None, embeds, settings)
        length = (ids if embeds is None else embeds).shape[1]
        inputs, _, selection, offsets = hooks.widened(kwargs if embeds is None else kwargs | {"input_ids": None})
        if hooks.takes_position_ids and hooks.first_position and inputs.get("position_ids") is None:
            # transformers starts at 0
            inputs["position_ids"] = positions_of(inputs["attention_mask"], hooks.first_position)
        kwargs = kwargs | inputs | settings.new_tokens(length)
        if ids is None:
            del kwargs["input_ids"]
        else:
            # beside inputs_embeds: for code that reads tokens, and for the returned sequences
            kwargs["input_ids"] = ids
        unseen = length - (0 if ids is None else ids.shape[1])
        return kwargs | {GENERATION: Generation(selection.delta(), selection.adapter_ids, offsets, unseen)}

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, dept_generation=None, **kwargs):
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if dept_generation is None:
            return model_inputs
        if model_inputs.get("inputs_embeds") is None:
            adapter_ids, offsets = dept_generation.expanded(input_ids.shape[0])
            ids = model_inputs["input_ids"]
            column = dept_generation.unseen + input_ids.shape[1] - ids.shape[1]
            embeddings = self.dept_hooks.layer.embed_next(dept_generation.delta, adapter_ids, ids, column, offsets)
            model_inputs = {**model_inputs, "input_ids": None, "inputs_embeds": embeddings}
        return {**model_inputs, GENERATION: dept_generation}

    def init_continuous_batching(self, *args, **kwargs):
        if self.dept_hooks.layer.is_active():
            self._dept_refuse(["continuous batching"], "give several sequences in a row one prompt")
        return super().init_continuous_batching(*args, **kwargs)

    def _dept_refuse(self, options, consequence):
        if options:
            raise ValueError(
                f"DePT: generate of {type(self).__name__} cannot take {options}: transformers would {consequence}"
            )


class _Settings:
    """Looks up the settings of one ``generate`` in transformers' order of precedence."""

    def __init__(self, kwargs, config, default):
        self._sources = [kwargs, vars(config) if config is not None else {}, vars(default)]

    def get(self, name):
        return next((source[name] for source in self._sources if source.get(name) is not None), None)

    def new_tokens(self, length: int) -> dict:
        """``max_length`` and ``min_length`` as numbers of new tokens: they include the ``length`` input tokens.

        Transformers would subtract the number of columns, which includes the prompt.
        """
        totals = {"max_new_tokens": self.get("max_length"), "min_new_tokens": self.get("min_length")}
        return {name: max(total - length, 0) for name, total in totals.items() if total and self.get(name) is None}


def _mask_of(ids, embeds, settings):
    """The mask that transformers infers without one: padding tokens are masked, unless they are end tokens."""
    if ids is None:
        return torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    pad, eos = settings.get("pad_token_id"), settings.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]
    return (ids != pad).long() if pad is not None and pad not in ends else torch.ones_like(ids)
