"""The tuner: how PEFT puts adapters on a model and takes them off again."""

from torch import nn

from ..class_swap import put_on, take_off
from ..peft_method import AddedLayerTuner
from . import family
from .config import DePTConfig
from .generation import DePTGenerationMixin
from .hooks import Hooks
from .layer import DePTLayer


class DePTModel(AddedLayerTuner):
    """No module is replaced: a layer with the parameters is added, and hooks widen the inputs."""

    prefix = "dept_"
    tuner_layer_cls = DePTLayer
    why_unmergeable = (
        "DePT cannot be merged: the prompt is input of its own, and the update of an embedding depends on the token's position, while the"
        " embedding table has one row per token."
    )

    def adapter_layer(self) -> DePTLayer:
        return self.model.dept

    def inject_adapter(self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None):
        config = self.peft_config[adapter_name]
        if not isinstance(getattr(model, "dept", None), DePTLayer):
            self._attach(model)
        _complete(config, model.dept_hooks.module)
        model.dept.add(adapter_name, config, empty=low_cpu_mem_usage)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _attach(self, model):
        module = family.adapted_module(model)
        layer = DePTLayer(module)
        hooks = Hooks(module, layer)
        model.requires_grad_(False)  # before there is a tuner layer: PEFT keeps what it finds beside one
        model.dept, model.dept_hooks = layer, hooks
        if model.can_generate():
            put_on(model, DePTGenerationMixin)

    def detach(self):
        model = self.model
        if isinstance(model, DePTGenerationMixin):
            take_off(model, DePTGenerationMixin)
        for handle in model.dept_hooks.handles:
            handle.remove()
        del model.dept, model.dept_hooks


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
