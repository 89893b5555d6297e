"""Hooks around the forward of an adapted module, also within ``generate``."""

import inspect
import sys

import torch
from torch import Tensor, nn

from ..hf.call_state import CallState
from ..hf.names import cache_of
from . import family, probe, sequences
from .insertion import Insertion, leading_padding, positions_of
from .layer import DePTLayer, Selection

GENERATION = "dept_generation"  # the argument that tells a forward within generate that the prompt is already inserted
# marks caches of adapted forwards; other caches, such as prefix tuning's, cannot be continued
_HAS_PROMPT = "_has_dept_prompt"
# per-token arguments beside mask, positions and labels, and their values at the prompt
_FILL = {"token_type_ids": 0, "mm_token_type_ids": 0, "global_attention_mask": 0}
_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels", "logits_to_keep")
_OTHER_SEQUENCES = ("encoder_", "decoder_", "cross_attn_")


def _mark(cache):
    if hasattr(cache, "get_seq_length"):
        setattr(cache, _HAS_PROMPT, True)


class Hooks:
    """The forward hooks of an adapted module, as bound methods, so that a deep copy of the model gets its own."""

    def __init__(self, module: nn.Module, layer: DePTLayer):
        self.module, self.layer = module, layer
        self.inserted = CallState()  # the insertion, from the forward's pre-hook to its post-hook
        self.generate_inputs = CallState()  # within generate: the tokens of its input and their embeddings
        self.encoder_decoder = family.is_encoder_decoder(module)
        self.causal = family.is_causal(module)
        self.takes_position_ids = family.takes_position_ids(module)
        self.counts_columns = family.has_position_table(module) and not self.takes_position_ids
        self.first_position = family.first_position(module)
        self.max_columns = family.max_columns(module)
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
        submodules = {module.base_model, family.reader_of(module)} - {module}
        self.handles += [m.register_forward_pre_hook(self.before_submodule, with_kwargs=True) for m in submodules]

    def read(self):
        """Probe how the model reads its tokens, once its weights are loaded."""
        table = family.embedding_of(self.module)
        if table.weight.device.type != "meta" or hasattr(table, "_hf_hook"):
            self.layer.reading = probe.read(self.module, table)
            if self.layer.reading.by_ids:
                self.handles.append(self.layer.reading.table.register_forward_hook(self.replaced))

    def replaced(self, table, args, output):
        """Return the prepared embeddings in place of the table's output, and the output of columns behind them.

        Some models pad their ids to a window; these columns are behind the prepared ones.
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
            return (), kwargs | self.encoder_mask(kwargs)
        if (kwargs.get("input_ids") is None) == (kwargs.get("inputs_embeds") is None):
            return None  # the model raises its own error
        cache = None if self.encoder_decoder else cache_of(kwargs)
        past_length = 0 if cache is None else int(cache.get_seq_length())
        if past_length:
            inputs = self.continued(kwargs, past_length)
            return (), kwargs | self.plain_positions(kwargs, past_length, inputs["inputs_embeds"]) | inputs
        inputs, insertion, *_ = self.widened(kwargs)
        inputs = self.plain_positions(kwargs, 0, inputs["inputs_embeds"]) | inputs
        if self.layer.reading is not None and self.layer.reading.by_ids and kwargs.get("input_ids") is not None:
            self.embeddings.set(inputs.pop("inputs_embeds"))
            inputs["input_ids"] = insertion.widen(kwargs["input_ids"], self.layer.reading.filler)
        if self.encoder_decoder:
            inputs |= self.decoder_inputs(kwargs)
        else:
            inputs |= self.output_arguments(kwargs, insertion)
            self.inserted.set(insertion)
        return (), kwargs | inputs

    def before_submodule(self, submodule, args, kwargs):
        """Refuse ids that a caller passes to a submodule; the model passes embeddings, or ids with prepared ones."""
        if self.embeddings.get() is not None or probe.probing.get():
            return
        if (args and args[0] is not None or kwargs.get("input_ids") is not None) and self.layer.is_active():
            raise ValueError(
                f"DePT: {type(submodule).__name__} alone has no prompt; call {type(self.module).__name__}, which"
                " contains it"
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
        """The inputs of a batch with its prompts: replacements for ``kwargs``, the insertion, adapters and offsets.

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
                f"DePT: inputs of {type(self.module).__name__} must be text, because it takes positions of images and"
                " videos from input_ids, which a prompt does not have"
            )
        inputs |= {
            name: insertion.widen(kwargs[name], fill) for name, fill in _FILL.items() if kwargs.get(name) is not None
        }
        if kwargs.get("position_ids") is not None:
            inputs["position_ids"] = insertion.widen_positions(kwargs["position_ids"], self.first_position)
        elif mask is not None and self.needs_position_ids(selection, offsets):
            inputs["position_ids"] = positions_of(inputs["attention_mask"], self.first_position)
        return inputs, insertion, selection, offsets

    def with_placeholders(self, kwargs: dict, insertion: Insertion, embeddings: Tensor) -> Tensor:
        """``embeddings`` (B, m + L, d) without the update at image placeholders, which models find by their rows."""
        if not self.placeholders or kwargs.get("input_ids") is None or not family.is_multimodal(kwargs):
            return embeddings
        ids = insertion.widen(kwargs["input_ids"], -1)
        placeholders = torch.tensor(self.placeholders).to(ids.device, non_blocking=True)
        is_placeholder = torch.isin(ids, placeholders)[..., None]
        return torch.where(is_placeholder, self.layer.reading.table(ids.clamp_min(0)).to(embeddings.dtype), embeddings)

    def plain_positions(self, kwargs: dict, past_length: int, embeddings: Tensor) -> dict:
        """Text positions, for models that would otherwise reuse the shift of the previous call."""
        if not self.keeps_rope_deltas or kwargs.get("position_ids") is not None:
            return {}
        batch, columns, _ = embeddings.shape
        positions = torch.arange(past_length, past_length + columns, device=embeddings.device)
        return {"position_ids": positions.expand(batch, -1)}

    def output_arguments(self, kwargs: dict, insertion: Insertion) -> dict:
        """Arguments of a model that includes its head: token labels, and the tokens whose logits are kept."""
        inputs, labels, keep = {}, kwargs.get("labels"), kwargs.get("logits_to_keep")
        if labels is not None and self.module.can_generate():
            if self.causal and kwargs.get("num_items_in_batch") is not None:  # Trainer does not count the first token
                labels = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, 1:]], 1)
            inputs["labels"] = insertion.widen(labels, -100)
        if kwargs.get("shift_labels") is not None:
            inputs["shift_labels"] = insertion.widen(kwargs["shift_labels"], -100)
        if keep is not None:
            inputs["logits_to_keep"] = insertion.kept_logits(keep)
        return inputs

    def encoder_mask(self, kwargs: dict) -> dict:
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
        else:
            # the width does not tell whether generate has moved the padding, but moving it twice changes nothing
            rotation = leading_padding(mask) if config.position == "token" else None
            insertion = Insertion(0, length, False, rotation=rotation)
        return {"attention_mask": insertion.widen_mask(mask)}

    def continued(self, kwargs: dict, past_length: int) -> dict:
        """The inputs of a causal model that has seen ``past_length`` columns, prompt included."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None:
            raise ValueError("DePT: a forward that continues past_key_values must get input_ids, got inputs_embeds")
        selection = self.layer.select(ids.shape[0])
        column = past_length - selection.config.num_virtual_tokens
        length = column + ids.shape[1]
        if not hasattr(cache_of(kwargs), _HAS_PROMPT):
            raise ValueError(
                "DePT: past_key_values must come from this model with its adapter, because they lack the prompt's"
                f" {past_length - column} columns"
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
        elif mask is not None and self.needs_position_ids(selection, offsets):
            inputs["position_ids"] = positions_of(mask, self.first_position)[:, -ids.shape[1] :]
        return inputs

    def insertion(self, selection: Selection, length: int, offsets: Tensor | None) -> Insertion:
        """The place of the prompt in each row.

        No masked column may stand between prompt and tokens, because some models count columns. A causal model keeps
        its padding in front of prompt and tokens. For other models padding moves to the end, and so does the masked
        prompt of a row without an adapter.
        """
        config = selection.config
        after_first = config.insert_after_first and length > 0
        has_adapter = lead = None
        if selection.has_base_rows:
            if "attention_mask" not in self.argument_names or (self.causal and self.counts_columns):
                raise ValueError(
                    f"DePT: rows without an adapter cannot share a batch with others in {type(self.module).__name__},"
                    " which cannot mask the prompt"
                )
            has_adapter = selection.adapter_ids >= 0
        if self.causal:
            lead = offsets if offsets is None else offsets + int(after_first)
        elif has_adapter is not None:
            lead = torch.where(has_adapter, int(after_first), length)
        rotation = None if self.causal else offsets
        return Insertion(config.num_virtual_tokens, length, after_first, has_adapter, rotation=rotation, lead=lead)

    def needs_position_ids(self, selection: Selection, offsets: Tensor | None) -> bool:
        """Whether the model needs explicit positions because masked columns may precede visible columns."""
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
        config = selection.config
        needs_right_padding = config.insert_after_first and config.position == "padded"
        # reading the mask on a GPU would synchronize
        readable = mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if needs_right_padding and readable and length and bool(((mask[:, 0] == 0) & (mask != 0).any(1)).any()):
            raise ValueError(
                "DePT: insert_after_first=True with position='padded' needs inputs that are padded on the right, got an"
                " attention_mask that starts with 0"
            )
        return leading_padding(mask) if config.position == "token" else None

    def check_length(self, config, length):
        if length > config.max_length:
            raise ValueError(
                f"DePT: the input must have at most {config.max_length} tokens, the adapter's max_length, got {length}"
            )
        columns = config.num_virtual_tokens + length
        if self.max_columns is not None and columns > self.max_columns:
            raise ValueError(
                f"DePT: {config.num_virtual_tokens} prompt rows and {length} tokens make {columns} columns, but the"
                f" model has {self.max_columns} positions"
            )

    def check_arguments(self, kwargs, shape):
        """Refuse unknown arguments with a value per token: they would lack values for the prompt's columns."""
        for name, value in kwargs.items():
            supported = name in (*_TOKENS, *_FILL) or name.startswith(_OTHER_SEQUENCES)
            if not supported and isinstance(value, Tensor) and tuple(value.shape[:2]) == shape and shape[1] > 1:
                raise ValueError(
                    f"DePT: {name} of {type(self.module).__name__} must be None, because it has a value for each token"
                    f" and none for the prompt's rows, got {tuple(value.shape)}"
                )

    def decoder_inputs(self, kwargs: dict) -> dict:
        """Decoder inputs for models that decode the shifted ``input_ids`` by default, which are replaced."""
        shift = getattr(sys.modules[type(self.module).__module__], "shift_tokens_right", None)
        if shift is None and hasattr(self.module, "qa_outputs"):  # T5 for question answering
            shift = getattr(self.module, "_shift_right", None)
        names = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
        has_own = any(kwargs.get(name) is not None for name in names)
        if has_own or shift is None or kwargs.get("input_ids") is None:
            return {}
        parameters = inspect.signature(shift).parameters
        ids = ("pad_token_id", "decoder_start_token_id")
        arguments = {name: getattr(self.module.config, name, None) for name in ids if name in parameters}
        return {"decoder_input_ids": shift(kwargs["input_ids"], **arguments)}
