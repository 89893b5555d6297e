"""Hooks around the forward of an encoder."""

import inspect

import torch
from torch import Tensor, nn

from ..ops import special_token_slots
from . import family
from .injection import Injection, State
from .layer import PASTALayer, Selection


class Hooks:
    """The forward hooks of an encoder, as bound methods, so that a deep copy of the model gets its own.

    Special tokens are found and dropout is drawn once per forward, for all layers.
    """

    def __init__(self, module: nn.Module, layer: PASTALayer):
        self.module, self.layer, self.state = module, layer, State(layer)
        self.argument_names = list(inspect.signature(module.forward).parameters)
        self.in_place = module.config.model_type in family.IN_PLACE
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, module, args, kwargs):
        self.state.call.set(self.prepared(dict(zip(self.argument_names, args)) | kwargs) or False)

    def after(self, module, args, output):
        injection = self.state.call.get()
        self.state.call.set(None)
        return injection.restored(output) if injection else output

    def prepared(self, kwargs: dict) -> Injection | None:
        """The injection for a forward with the arguments ``kwargs``; None if nothing is added."""
        if not self.layer.is_active():
            return None
        ids = kwargs.get("input_ids")
        if ids is not None:
            mask = kwargs.get("attention_mask")
            mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None  # other masks do not mark padding
            if mask is not None and kwargs.get("past_key_values") is not None:
                mask = mask[:, -ids.shape[1] :]  # prefix tuning puts its own columns in front
            return self.injection(ids, mask, self.records(kwargs))
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("PASTA: special tokens are found in input_ids, got inputs_embeds alone")
        return None

    def injection(self, ids: Tensor, mask: Tensor | None, recorded: bool) -> Injection:
        selection = self.layer.select(ids.shape[0])
        dropout = selection.config.dropout if self.module.training else 0.0
        layers = len(selection.vectors)
        return Injection(
            slots=self.slots(selection, ids, mask),
            vectors=selection.vectors,
            adapter_ids=selection.adapter_ids,
            dropout=dropout,
            seeds=torch.randint(2**63 - 1, (layers,), device=ids.device).unbind(0) if dropout else None,
            shape=ids.shape,
            recorded=recorded,
            in_place=self.in_place and not recorded,
        )

    def slots(self, selection: Selection, ids: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"PASTA: attention_mask must be {tuple(ids.shape)}, as input_ids, got {tuple(mask.shape)}")
        config = selection.config
        if selection.has_base_rows:  # base rows may have any number of special tokens
            adapted = (selection.adapter_ids >= 0).to(ids.device)[:, None].expand(ids.shape)
            mask = adapted if mask is None else adapted & (mask != 0)
        max_slots = ids.shape[1] if config.overflow == "last" else config.num_special_tokens
        try:
            special_ids = selection.special_ids.to(ids.device)
            return special_token_slots(ids, special_ids, max_slots=max_slots, attention_mask=mask)
        except ValueError as error:
            raise ValueError(
                f"PASTA: {error}. The adapter has num_special_tokens={config.num_special_tokens} vectors for tokens"
                f" {config.special_token_ids}; overflow='last' gives the last vector to all further tokens."
            ) from error

    def records(self, kwargs: dict) -> bool:
        """Whether the encoder returns the hidden states between its layers."""
        records = kwargs.get("output_hidden_states")
        return bool(getattr(self.module.config, "output_hidden_states", False) if records is None else records)
