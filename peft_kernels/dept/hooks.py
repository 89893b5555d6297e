"""Hooks around the forward of an adapted module, also within ``generate``."""

import inspect
import sys

import torch
from torch import Tensor, nn

from ..hf.call_state import CallState
from . import family, probe, sequences
from .insertion import Insertion, leading_padding, positions_of
from .layer import DePTLayer, Selection

GENERATION = "dept_generation"  # the argument that tells a forward within generate that the prompt is already inserted
_HAS_PROMPT = (
    "_has_dept_prompt"  # marks caches of adapted forwards; other caches, such as prefix tuning's, cannot be continued
)
# per-token arguments beside mask, positions and labels
_FILL = {
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "global_attention_mask": 0,
}
_WIDENED = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "labels",
    "shift_labels",
    "logits_to_keep",
    *_FILL,
}
_OF_OTHER_TOKENS = ("encoder_", "decoder_", "cross_attn_")


def cache_of(kwargs: dict):
    """The key/value cache among ``kwargs``, or None; transformers 5.24 renamed the argument and takes both names."""
    return next((kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None), None)


def _mark(cache):
    if hasattr(cache, "get_seq_length"):
        setattr(cache, _HAS_PROMPT, True)


class Hooks:
    """The forward hooks of an adapted module, as bound methods, so that a deep copy of the model gets its own."""

    def __init__(self, module: nn.Module, layer: DePTLayer):
        self.module, self.layer = module, layer
        self.inserted = CallState()  # the insertion, from the forward's pre-hook to its post-hook
        self.given_to_generate = CallState()  # within generate: the tokens of its input and their embeddings
        self.encoder_decoder = family.is_encoder_decoder(module)
        self.causal = family.is_causal(module)
        self.takes_position_ids = family.takes_position_ids(module)
        self.counts_columns = family.has_position_table(module) and not self.takes_position_ids
        self.first_position = family.first_position(module)
        self.most_columns = family.most_columns(module)
        self.argument_names = list(inspect.signature(module.forward).parameters)
        self.placeholders, self.keeps_rope_deltas = family.placeholder_ids(module), family.keeps_rope_deltas(module)
        # (B, m + L, d), replaces the embedding module's output for a model that needs ids
        self.embeddings = CallState()
        self.handles = []
        self.read()
        self.handles += [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, always_call=True),
        ]
        parts = {module.base_model, family.reader_of(module)} - {module}
        self.handles += [part.register_forward_pre_hook(self.before_part, with_kwargs=True) for part in parts]

    def read(self):
        """Probe how the model reads its tokens, once its weights are loaded."""
        table = family.embedding_of(self.module)
        if table.weight.device.type != "meta" or hasattr(table, "_hf_hook"):
            self.layer.reading = probe.read(self.module, table)
            if self.layer.reading.by_ids:
                self.handles.append(self.layer.reading.table.register_forward_hook(self.replaced))

    def replaced(self, table, args, output):
        """Return the prepared embeddings in place of the table's output; keep further columns of a model that pads its
        ids to a window.
        """
        embeddings = self.embeddings.get()
        if embeddings is None:
            return None
        self.embeddings.set(None)
        return torch.cat([embeddings, output[:, embeddings.shape[1] :].to(embeddings.dtype)], 1)

    def before(self, module, args, kwargs):
        if probe.probing.get():
            return None
        if self.layer.reading is None:
            self.read()
        self.embeddings.set(None)
        self.inserted.set(None)
        if GENERATION in kwargs:
            _mark(cache_of(kwargs))
            return args, {k: v for k, v in kwargs.items() if k != GENERATION}
        if not self.layer.is_active():
            return None
        kwargs = dict(zip(self.argument_names, args)) | kwargs
        if kwargs.get("encoder_outputs") is not None:
            return (), kwargs | self.encoded(kwargs)
        if (kwargs.get("input_ids") is None) == (kwargs.get("inputs_embeds") is None):
            return None  # the model raises its own error
        cache = None if self.encoder_decoder else cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        if past:
            inputs = self.continued(kwargs, past)
            return (), kwargs | self.plain_positions(kwargs, past, inputs["inputs_embeds"]) | inputs
        inputs, insertion, *_ = self.widened(kwargs)
        inputs = self.plain_positions(kwargs, 0, inputs["inputs_embeds"]) | inputs
        if self.layer.reading is not None and self.layer.reading.by_ids and kwargs.get("input_ids") is not None:
            self.embeddings.set(inputs.pop("inputs_embeds"))
            inputs["input_ids"] = insertion.widen(kwargs["input_ids"], self.layer.reading.filler)
        if self.encoder_decoder:
            inputs |= self.decoder_inputs(kwargs)
        else:
            inputs |= self.outputs_asked_for(kwargs, insertion)
            self.inserted.set(insertion)
        return (), kwargs | inputs

    def before_part(self, part, args, kwargs):
        """Refuse a submodule that is called by itself with ids; the model passes it embeddings, or ids whose embeddings
        are prepared.
        """
        if self.embeddings.get() is not None or probe.probing.get():
            return
        if (args and args[0] is not None or kwargs.get("input_ids") is not None) and self.layer.is_active():
            raise ValueError(
                f"DePT: {type(part).__name__} alone has no prompt; call {type(self.module).__name__}, which it is a"
                " part of"
            )

    def after(self, module, args, output):
        insertion = self.inserted.get()
        self.inserted.set(None)
        self.embeddings.set(None)
        if insertion is None or output is None:
            return None
        for value in output.values() if hasattr(output, "values") else output:
            _mark(value)
        if hasattr(output, "items"):
            return type(output)(**{k: insertion.narrow(v) for k, v in output.items()})
        return insertion.narrow(output)

    def widened(self, kwargs: dict) -> tuple[dict, Insertion, Selection, Tensor | None]:
        """The inputs of a batch with its prompts: replacements for ``kwargs``, the positions of the prompts, the
            adapters, the offsets.

        Raises:
            ValueError: the input is too long, the mask is not (B, L), or padding is on the left and the prompt follows
                the first token.
        """
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        batch, length = (ids if ids is not None else embeds).shape[:2]
        selection = self.layer.select(batch)
        self.check_length(selection.config, length)
        mask = kwargs.get("attention_mask")
        if mask is None and selection.has_base_rows:
            mask = (ids if ids is not None else embeds[..., 0]).new_ones(batch, length, dtype=torch.long)
        offsets = self.offsets(selection, mask, length)
        sequences.check(kwargs, mask)
        self.check_arguments(kwargs, (batch, length))
        insertion = self.insertion(selection, length, offsets)
        ids, embeds = (x if x is None else insertion.rotate(x) for x in (ids, embeds))
        embeddings = self.layer.embed(selection, ids, embeds, offsets if self.causal else None)
        inputs = {
            "input_ids": None,
            "inputs_embeds": self.with_placeholders(kwargs, insertion, insertion.arrange(embeddings)),
            "attention_mask": mask if mask is None else insertion.widen_mask(mask),
        }
        if self.placeholders and self.keeps_rope_deltas and family.is_multimodal(kwargs):
            raise ValueError(
                f"DePT: {type(self.module).__name__} takes positions of images and videos from input_ids, which a"
                " prompt does not have: it can be given text alone"
            )
        inputs |= {
            name: insertion.widen(kwargs[name], fill) for name, fill in _FILL.items() if kwargs.get(name) is not None
        }
        if kwargs.get("position_ids") is not None:
            inputs["position_ids"] = insertion.widen_positions(kwargs["position_ids"], self.first_position)
        elif mask is not None and self.counts_what_is_masked(selection, offsets):
            inputs["position_ids"] = positions_of(inputs["attention_mask"], self.first_position)
        return inputs, insertion, selection, offsets

    def with_placeholders(self, kwargs: dict, insertion: Insertion, embeddings: Tensor) -> Tensor:
        """``embeddings`` (B, m + L, d) without the update at image placeholders, which models find by comparing with
        the table's row.
        """
        if not self.placeholders or kwargs.get("input_ids") is None or not family.is_multimodal(kwargs):
            return embeddings
        ids = insertion.widen(kwargs["input_ids"], -1)
        held = torch.isin(ids, torch.tensor(self.placeholders).to(ids.device, non_blocking=True))
        return torch.where(held[..., None], self.layer.reading.table(ids.clamp_min(0)).to(embeddings.dtype), embeddings)

    def plain_positions(self, kwargs: dict, past: int, embeddings: Tensor) -> dict:
        """Text positions, for models that would otherwise reuse the shift of the previous call."""
        if not self.keeps_rope_deltas or kwargs.get("position_ids") is not None:
            return {}
        batch, columns, _ = embeddings.shape
        return {"position_ids": torch.arange(past, past + columns, device=embeddings.device).expand(batch, -1)}

    def outputs_asked_for(self, kwargs: dict, insertion: Insertion) -> dict:
        """Arguments of a model that includes its head: token labels, and the tokens whose logits are kept."""
        inputs, labels, keep = {}, kwargs.get("labels"), kwargs.get("logits_to_keep")
        if labels is not None and self.module.can_generate():
            if self.causal and kwargs.get("num_items_in_batch") is not None:  # Trainer does not count the first token
                labels = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, 1:]], 1)
            inputs["labels"] = insertion.widen(labels, -100)
        if kwargs.get("shift_labels") is not None:
            inputs["shift_labels"] = insertion.widen(kwargs["shift_labels"], -100)
        if keep is not None:
            inputs["logits_to_keep"] = insertion.kept(keep)
        return inputs

    def encoded(self, kwargs: dict) -> dict:
        """The mask of an adapted encoder's output, from the user's mask of the tokens."""
        states, mask = kwargs["encoder_outputs"][0], kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2:
            return {}
        names = self.layer.row_adapters.get() or self.layer.active_adapters
        config = next(self.layer.configs[name] for name in names if name in self.layer.configs)
        length = states.shape[1] - config.num_virtual_tokens
        if mask.shape[1] != length:  # generate has already widened it
            return {}
        if config.num_virtual_tokens:
            selection = self.layer.select(states.shape[0])
            insertion = self.insertion(selection, length, self.offsets(selection, mask, length))
        # no prompt: the width does not tell whether generate has moved the padding, but moving it twice changes nothing
        else:
            insertion = Insertion(
                0, length, False, rotation=leading_padding(mask) if config.position == "token" else None
            )
        return {"attention_mask": insertion.widen_mask(mask)}

    def continued(self, kwargs: dict, past: int) -> dict:
        """The inputs of a causal model that has seen ``past`` columns, prompt included."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None:
            raise ValueError("DePT: input_ids are needed where past_key_values continue an input, got inputs_embeds")
        selection = self.layer.select(ids.shape[0])
        column = past - selection.config.num_virtual_tokens
        length = column + ids.shape[1]
        if not hasattr(cache_of(kwargs), _HAS_PROMPT):
            raise ValueError(
                "DePT: past_key_values must come from this model with its adapter, because they lack the prompt's"
                f" {past - column} columns"
            )
        if mask is None and selection.has_base_rows:
            mask = ids.new_ones(ids.shape[0], length)
        offsets = self.offsets(selection, mask, length)
        insertion = self.insertion(selection, length, offsets)
        mask = mask if mask is None else insertion.widen_mask(mask)
        inputs = {
            "input_ids": None,
            "inputs_embeds": self.layer.embed_next(selection.delta(), selection.adapter_ids, ids, column, offsets),
            "attention_mask": mask,
        }
        if kwargs.get("position_ids") is not None:
            inputs["position_ids"] = insertion.shift(kwargs["position_ids"])
        elif mask is not None and self.counts_what_is_masked(selection, offsets):
            inputs["position_ids"] = positions_of(mask, self.first_position)[:, -ids.shape[1] :]
        return inputs

    def insertion(self, selection: Selection, length: int, offsets: Tensor | None) -> Insertion:
        """The place of the prompt in each row. No masked column may stand between prompt and tokens, because some
        models count columns.

        A causal model keeps its padding in front of prompt and tokens. For other models padding moves to the end, and
        so does the masked prompt of a row without an adapter.
        """
        config = selection.config
        after_first = config.insert_after_first and length > 0
        used = lead = None
        if selection.has_base_rows:
            if "attention_mask" not in self.argument_names or (self.causal and self.counts_columns):
                raise ValueError(
                    f"DePT: rows without an adapter cannot share a batch with others in {type(self.module).__name__},"
                    " which cannot be told to pass over the prompt"
                )
            used = selection.adapter_ids >= 0
        if self.causal:
            lead = offsets if offsets is None else offsets + int(after_first)
        elif used is not None:
            lead = torch.where(used, int(after_first), length)
        return Insertion(
            config.num_virtual_tokens, length, after_first, used, rotation=None if self.causal else offsets, lead=lead
        )

    def counts_what_is_masked(self, selection: Selection, offsets: Tensor | None) -> bool:
        """Whether the model needs explicit positions because masked columns precede visible ones; RoBERTa skips padding
        itself.
        """
        return (
            self.causal
            and self.takes_position_ids
            and (selection.has_base_rows or offsets is not None or self.first_position > 0)
        )

    def offsets(self, selection: Selection, mask: Tensor | None, length: int) -> Tensor | None:
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != length:
            raise ValueError(
                f"DePT: attention_mask must be (B, {length}), got"
                f" {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
            )
        # reading the mask on a GPU would synchronize
        config = selection.config
        by_columns = config.insert_after_first and config.position == "padded"
        looks = by_columns and mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and length and bool(((mask[:, 0] == 0) & (mask != 0).any(1)).any()):
            raise ValueError(
                "DePT: insert_after_first=True with position='padded' needs inputs that are padded on the right, got an"
                " attention_mask that starts with 0"
            )
        return leading_padding(mask) if config.position == "token" else None

    def check_length(self, config, length):
        if length > config.max_length:
            raise ValueError(
                f"DePT: the input has {length} tokens, more than the adapter's max_length={config.max_length}"
            )
        columns = config.num_virtual_tokens + length
        if self.most_columns is not None and columns > self.most_columns:
            raise ValueError(
                f"DePT: {config.num_virtual_tokens} prompt rows and {length} tokens make {columns} columns, but the"
                f" model has positions for {self.most_columns}"
            )

    def check_arguments(self, kwargs, shape):
        """Refuse unknown arguments with a value per token: their columns would be misaligned with the prompt's."""
        for name, value in kwargs.items():
            known = name in _WIDENED or name.startswith(_OF_OTHER_TOKENS)
            if not known and isinstance(value, Tensor) and tuple(value.shape[:2]) == shape and shape[1] > 1:
                raise ValueError(
                    f"DePT: {type(self.module).__name__} must be given no {name}, which has a value for each token: the"
                    f" prompt's rows have none, got {tuple(value.shape)}"
                )

    def decoder_inputs(self, kwargs: dict) -> dict:
        """Decoder inputs for models that decode the shifted ``input_ids`` by default, which ``inputs_embeds``
        replace.
        """
        shift = getattr(sys.modules[type(self.module).__module__], "shift_tokens_right", None)
        if shift is None and hasattr(self.module, "qa_outputs"):  # T5 for question answering
            shift = getattr(self.module, "_shift_right", None)
        given = any(kwargs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
        if given or shift is None or kwargs.get("input_ids") is None:
            return {}
        config = self.module.config
        known = {name: getattr(config, name, None) for name in ("pad_token_id", "decoder_start_token_id")}
        known = {name: value for name, value in known.items() if name in inspect.signature(shift).parameters}
        return {"decoder_input_ids": shift(kwargs["input_ids"], **known)}
