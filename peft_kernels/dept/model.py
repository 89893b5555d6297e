"""The tuner: how PEFT puts adapters on a model and takes them off again."""

from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from . import family
from .config import PREFIX, DePTConfig
from .generation import DePTGenerationMixin
from .hooks import Hooks
from .layer import DePTLayer


class DePTModel(BaseTuner):
    """No module is replaced: a layer with the parameters is added, and hooks widen the inputs."""

    prefix = PREFIX
    tuner_layer_cls = DePTLayer
    target_module_mapping = {}

    def inject_adapter(self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None):
        config = self.peft_config[adapter_name]
        if not isinstance(getattr(model, "dept", None), DePTLayer):
            self._attach(model)
        _complete(config, model.dept_hooks.module)
        model.dept.add(adapter_name, config, empty=low_cpu_mem_usage)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _attach(self, model):
        module = family.adapted_module(model)
        model.requires_grad_(False)  # before there is a tuner layer: PEFT keeps what it finds beside one
        layer = DePTLayer(module)
        hooks = Hooks(module, layer)
        model.dept, model.dept_hooks = layer, hooks
        if model.can_generate():
            stock = type(model)
            # the stock class's name and module, because transformers looks at both
            names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
            model.__class__ = type(stock.__name__, (DePTGenerationMixin, stock), names)

    def _detach(self, model):
        if isinstance(model, DePTGenerationMixin) and type(model).__bases__[0] is not DePTGenerationMixin:
            raise RuntimeError(f"DePT: what was put onto {type(model).__name__} after the adapter has to be taken off before it")
        for handle in model.dept_hooks.handles:
            handle.remove()
        if isinstance(model, DePTGenerationMixin):
            model.__class__ = type(model).__bases__[1]
        del model.dept, model.dept_hooks

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs):
        """PEFT's way to hand over ``adapter_names``: one for each row of the batch."""
        layer = self.model.dept
        before, layer.adapter_names = layer.adapter_names, adapter_names
        try:
            yield
        finally:
            layer.adapter_names = before

    def _prepare_adapter_config(self, peft_config, model_config):
        return peft_config

    def _create_and_replace(self, *args, **kwargs):
        raise NotImplementedError("DePT replaces no module")

    def _check_merge_allowed(self):
        raise NotImplementedError(
            "DePT cannot be merged: the prompt is input of its own, and the update of an embedding depends on the token's position, while the"
            " embedding table has one row per token. Use unload() to take the adapter off."
        )

    def _unload_and_optionally_merge(self, merge=True, *args, **kwargs):
        if merge:
            self._check_merge_allowed()
        self._detach(self.model)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)


def _complete(config: DePTConfig, module: nn.Module) -> None:
    """What depends on the model or on a tokenizer, written down: the saved configuration needs neither."""
    if config.insert_after_first is None:
        config.insert_after_first = family.inserts_after_first(module)
    if config.init_text is not None and config.init_token_ids is None and not config.inference_mode:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
        config.init_token_ids = tokenizer(config.init_text)["input_ids"]
        if not config.init_token_ids:
            raise ValueError(f"DePTConfig: init_text={config.init_text!r} has no tokens")
