"""The modules trained and saved beside an adapter, above all the task head: their selection, and their use per row."""

import torch
from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .class_swap import Swapped, put_on

BASE = "__base__"  # PEFT's name, in adapter_names, for no adapter
_TASKS_WITH_HEADS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


def add_heads(config: PeftConfig, model: nn.Module) -> None:
    """Add the task head to ``modules_to_save``. PEFT's own rule knows only some names of heads."""
    if config.task_type in _TASKS_WITH_HEADS:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *_heads(model)]))


def _heads(model):
    """The names of the children of ``model`` outside its base, and of a pooler that the checkpoint lacks.

    If the checkpoint lacks some of them, those that it has are left out: ModernBERT's head was trained with the base.
    """
    base, embedding = model.base_model, model.get_input_embeddings()
    heads = {name: child for name, child in model.named_children() if child is not base and _has_parameters(child)}
    if base is model:  # the base is not a child: T5 for question answering
        heads = {name: child for name, child in heads.items() if not _is_body(child, embedding)}
    random = [name for name, head in heads.items() if not _is_loaded(head)]
    pooler = getattr(base, "pooler", None)
    if isinstance(pooler, nn.Module) and _has_parameters(pooler) and _is_loaded(embedding) and not _is_loaded(pooler):
        random.append(next(name for name, module in model.named_modules() if module is pooler))
    return random or list(heads)


def _has_parameters(module):
    return not isinstance(module, BaseTunerLayer) and any(True for _ in module.parameters())


def _is_body(module, embedding):
    table = getattr(embedding, "weight", embedding)
    return any(isinstance(m, nn.ModuleList) or getattr(m, "weight", None) is table for m in module.modules())


def _is_loaded(module):
    """Whether ``from_pretrained`` loaded all parameters; transformers marks the loaded ones."""
    module = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
    return all(getattr(p, "_is_hf_initialized", False) for p in module.parameters())


class RowWise(Swapped):
    """Mixin for PEFT's wrapper of a head: each row of a mixed batch goes through the head of its own adapter.

    PEFT's own implementation knows only linear layers and embeddings, and keeps the names in hooks on the module, which
    threads share.

    A PEFT method above ours switches all wrappers to its adapter; a wrapper without a module for that adapter then
    falls back to the base module. With this mixin such a wrapper stays with the active adapter below, and a module that
    the method above adds is used at once.
    """

    layer: tuple  # holds the AdapterLayer beside which the module is trained; a tuple, so that it is not a submodule
    requested: tuple[str, ...] = ()  # the last requested active adapters, whether the module has them or not

    @property
    def active_adapters(self):
        names = self._active_adapter  # torch.compile cannot read the property of super()
        names = [names] if isinstance(names, str) else names
        return names or [name for name in self.layer[0].active_adapters if name in self.modules_to_save]

    @property
    def active_adapter(self):
        return next(iter(self.active_adapters), [])

    def check_set_adapter(self, adapter_name):
        self.requested = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        return super().check_set_adapter(adapter_name)

    def update(self, adapter_name, **kwargs):
        super().update(adapter_name, **kwargs)
        if not self._active_adapter and adapter_name in self.requested:
            self._active_adapter = [adapter_name]

    def forward(self, *args, **kwargs):
        names = self.layer[0].row_adapters.get()
        if names is None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        adapters = list(dict.fromkeys(names))
        # each module gets all rows, because it is unknown which arguments have rows
        outputs = [self._module_of(name)(*args, **kwargs) for name in adapters]
        if len(adapters) == 1:
            return outputs[0]
        outputs = torch.stack([self._with_rows(output, len(names)) for output in outputs])
        indices = torch.tensor([adapters.index(name) for name in names], device=outputs.device)
        indices = indices.repeat_interleave(outputs.shape[1] // len(names))  # the beams of a row are adjacent
        return outputs[indices, torch.arange(len(indices), device=indices.device)]

    def _with_rows(self, output, batch):
        if isinstance(output, Tensor) and output.ndim and output.shape[0] == 1:  # one row for all, as for positions
            return output.expand(batch, *output.shape[1:])
        if isinstance(output, Tensor) and output.ndim and output.shape[0] % batch == 0:
            return output
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"adapter_names: {type(self.original_module).__name__}, one of modules_to_save, must return {batch} rows,"
            f" got {shape}"
        )

    def _module_of(self, name):
        """The module of the adapter ``name``, or the original one."""
        return self.modules_to_save[name] if name in self.modules_to_save else self.original_module  # noqa: SIM401  a ModuleDict has no get


def follow(model: nn.Module, layer: BaseTunerLayer) -> None:
    """Make all wrapped modules of ``model`` follow the active adapters of ``layer`` and the adapter of each row."""
    for wrapper in [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]:
        wrapper.layer = (layer,)
        if not isinstance(wrapper, RowWise):
            put_on(wrapper, RowWise)


def refuse_when_run_again(model: nn.Module) -> None:
    """Refuse a wrapped module in a checkpointed layer: the rows' adapters are unknown when it runs again in backward.

    Raises:
        ValueError: ``model`` has such a module.
    """
    for name, layer in model.named_modules():
        checkpointed = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training
        if checkpointed and any(isinstance(module, ModulesToSaveWrapper) for module in layer.modules()):
            raise ValueError(
                f"adapter_names: {name} is checkpointed and holds one of modules_to_save, which cannot be trained in a"
                " mixed batch"
            )
