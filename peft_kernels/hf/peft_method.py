"""Base classes for methods of PEFT: registration of a type, a layer with the parameters, a tuner that adds it."""

from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .call_state import CallState
from .peft_heads import BASE, add_heads, follow, refuse_when_run_again


def peft_type(name: str) -> PeftType:
    """The member ``name`` of ``PeftType``, added if it is missing: PEFT registers only methods of its enumeration."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


def register(kind: PeftType, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Register the method with ``get_peft_model`` and ``PeftModel.from_pretrained``, once per process."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=kind.value.lower(), config_cls=config, model_cls=tuner, prefix=tuner.prefix)


def check_pretrained(method: str, model: nn.Module) -> None:
    """Raise an error unless ``model`` is a transformers model that reads tokens."""
    name = type(model).__name__
    if not hasattr(model, "base_model") or not hasattr(model, "can_generate"):
        raise TypeError(f"{method}: model must be a transformers PreTrainedModel, got {name}")
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(
            f"{method}: model must read input_ids, but the main input of {name} is {model.main_input_name!r}"
        )
    try:
        model.get_input_embeddings()
    except NotImplementedError as error:
        raise ValueError(f"{method}: model must embed its tokens by a table, but {name} has none") from error


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside all ``PeftModel`` wrappers.

    Their ``peft_config`` is not read: while a method is being added, it may be that of the method above.
    """
    while isinstance(model, PeftModel):
        below = model.base_model
        model = below if isinstance(below, (PeftModel, PreTrainedModel)) else below.model
    return model


def freeze(model: nn.Module) -> None:
    """Freeze ``model`` if it has no tuner layer; otherwise another method's parameters stay trainable."""
    if not any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        model.requires_grad_(False)


def is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(module.config, "is_encoder_decoder", False))


def is_causal(module: nn.Module) -> bool:
    """Whether tokens attend only to earlier tokens: a decoder without encoder, with any head."""
    kind = module.config.model_type
    return not is_encoder_decoder(module) and (
        module.can_generate()
        or getattr(module.config, "is_decoder", False)
        or (kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    )


class AdapterParameters(nn.ParameterDict):
    """Parameters by adapter name, read by a call, so that hooks of accelerate and FSDP can load them."""

    __call__ = nn.Module.__call__  # ParameterDict's own raises

    def forward(self, name: str) -> nn.Parameter:
        return self[name]


class AdapterLayer(nn.Module, BaseTunerLayer):
    """The parameters of all adapters; it wraps no module and stands beside the module it extends."""

    method: str  # its name in error messages
    shared_in_batch: tuple[str, ...]  # the configuration fields on which adapters of one batch must agree
    other_param_names = ("configs",)

    def __init__(self, module: nn.Module):
        super().__init__()
        self._module = (module,)  # in a tuple, so that it is not a submodule
        self.configs: dict[str, PeftConfig] = {}
        self.row_adapters = CallState()  # the adapter names of the current batch's rows

    def get_base_layer(self) -> nn.Module:
        return self._module[0].get_input_embeddings()

    def _get_base_layer_device_and_dtype(self, base_layer):
        """The device to which PEFT moves an adapter, and None for the dtype, which ours keeps."""
        return self.device_for_adapters(), None

    def device_for_adapters(self) -> torch.device:
        """The device of the embedding; the CPU if the embedding is offloaded."""
        device = self.get_base_layer().weight.device
        return torch.device("cpu") if device.type == "meta" else device

    def merge(self, *args, **kwargs) -> None:
        """Do nothing: ``merge_adapter`` of another method calls this on every layer, and ours stays active."""

    def unmerge(self) -> None:
        """Do nothing, like ``merge``."""

    def is_active(self) -> bool:
        rows = self.row_adapters.get()
        names = self.active_adapters if rows is None else [n for n in rows if n != BASE]
        return bool(names) and not self.disable_adapters

    def adapters_of(self, batch: int) -> tuple[list[str], list[int] | None]:
        """The adapters of ``batch`` rows by name, and each row's index into them, -1 for none.

        The indices are None if all rows have the same adapter.

        Raises:
            ValueError: several adapters are active, a name is unknown, or the batch's adapters differ in a field that
                they must share.
        """
        method, rows = self.method, self.row_adapters.get()
        if rows is None:
            if len(self.active_adapters) != 1:
                raise ValueError(
                    f"{method}: one adapter must be active, got {self.active_adapters}; adapter_names= mixes adapters"
                    " in a batch"
                )
            return list(self.active_adapters), None
        if len(rows) != batch:
            raise ValueError(
                f"{method}: adapter_names must have one name for each of the {batch} rows, got {len(rows)}"
            )
        names = list(dict.fromkeys(n for n in rows if n != BASE))
        if unknown := [n for n in names if n not in self.configs]:
            raise ValueError(f"{method}: adapter_names must be among {[*self.configs, BASE]}, got {unknown}")
        shared = {n: tuple(getattr(self.configs[n], field) for field in self.shared_in_batch) for n in names}
        if any(values != shared[names[0]] for values in shared.values()):
            fields = " and ".join((", ".join(self.shared_in_batch[:-1]), self.shared_in_batch[-1]))
            raise ValueError(f"{method}: the adapters of one batch must share {fields}, got {shared}")
        return names, [-1 if n == BASE else names.index(n) for n in rows]


class _Configs(dict):
    """Configurations by adapter name; that of a deleted adapter is empty, because PEFT's forward still reads it."""

    def __init__(self, configs):
        super().__init__(configs)
        self.deleted = set()

    def __delitem__(self, name):
        super().__delitem__(name)
        self.deleted.add(name)

    def __missing__(self, name):
        if name in self.deleted:
            return PeftConfig()
        raise KeyError(name)


class AddedLayerTuner(BaseTuner):
    """Base of tuners that replace no module: they add an ``AdapterLayer``, and hooks or mixins that read it."""

    target_module_mapping = {}
    why_unmergeable: str

    def __init__(self, model, peft_config, adapter_name, *args, **kwargs):
        method = self.tuner_layer_cls.method
        for layer in (m for m in unwrapped(model).modules() if isinstance(m, AdapterLayer)):
            if not isinstance(layer, self.tuner_layer_cls):
                raise ValueError(
                    f"{method}: model has a {layer.method} adapter, and DePT replaces the input_ids in which PASTA"
                    " finds special tokens; unload() it before you add the other"
                )
            if isinstance(model, PeftModel) or adapter_name in layer.configs:
                raise ValueError(
                    f"{layer.method}: model has the {layer.method} adapters {list(layer.configs)}; add_adapter() adds"
                    " one of another name to them"
                )
        inner_configs = dict(model.peft_config) if isinstance(model, PeftModel) else None
        if inner_configs and adapter_name in inner_configs and model.active_peft_config.is_prompt_learning:
            kind = model.active_peft_config.peft_type.value  # PEFT would look for its model by our configuration
            raise ValueError(
                f"{method}: adapter_name must differ from that of {kind} below, got {adapter_name!r}; get_peft_model"
                " takes adapter_name="
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if inner_configs is None:
            self.peft_config = model.peft_config = _Configs(self.peft_config)
        else:  # PEFT would add our configuration to those of the method below
            self.peft_config = _Configs({adapter_name: self.peft_config[adapter_name]})
            model.peft_config = inner_configs

    def adapter_layer(self) -> AdapterLayer:
        raise NotImplementedError

    def detach(self) -> None:
        """Remove the layer, and the hooks or mixins by which the model reads it."""
        raise NotImplementedError

    def inject_adapter(
        self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None
    ):
        add_heads(self.peft_config[adapter_name], unwrapped(model))
        if not self.active_adapters:  # all were deleted; PEFT needs an active adapter for a head
            self.active_adapter = adapter_name
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        follow(model, self.adapter_layer())
        # PEFT does not switch a head that the method below has wrapped
        if isinstance(model, PeftModel) and adapter_name in self.active_adapters:
            self.set_adapter(adapter_name, inference_mode=self.peft_config[adapter_name].inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs):
        """Context in which PEFT passes ``adapter_names``, one for each row of the batch."""
        if adapter_names is not None and self.training:
            refuse_when_run_again(self.model)
        rows = self.adapter_layer().row_adapters
        outer = rows.get()
        rows.set(adapter_names)
        try:
            yield
        finally:
            rows.set(outer)

    def _prepare_adapter_config(self, peft_config, model_config):
        return peft_config

    def _create_and_replace(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} replaces no module")

    def _replace_module(self, parent, child_name, new_module, child):
        """Replace a head that PEFT has wrapped; PEFT's own method requires a ``weight`` on it."""
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self):
        raise NotImplementedError(f"{self.why_unmergeable} Use unload() to take the adapter off.")

    def unmerge_adapter(self):
        raise NotImplementedError(
            f"{self.adapter_layer().method} has nothing merged to undo. Use disable_adapter() to switch the adapter"
            " off."
        )

    def add_weighted_adapter(self, *args, **kwargs):
        raise NotImplementedError(
            f"{self.adapter_layer().method} cannot combine adapters into one. Use adapter_names= to give each row of"
            " a batch its own, or set_adapter()."
        )

    def _unload_and_optionally_merge(self, merge=True, *args, **kwargs):
        if merge:
            self._check_merge_allowed()
        self.detach()
        if isinstance(self.model, PeftModel):  # PEFT would take the method below off as well
            self.model.set_adapter(
                self.model.active_adapter, inference_mode=self.model.active_peft_config.inference_mode
            )
            return self.model
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)


# last, because they import the names above: importing either method registers both
from .. import dept, pasta  # noqa: E402, F401
