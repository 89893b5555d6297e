"""The tuner, by which PEFT adds and removes DePT adapters."""

from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn

from ..hf.class_swap import put_on, take_off
from ..hf.peft_method import AddedLayerTuner, freeze, is_encoder_decoder, unwrapped
from . import family
from .config import DePTConfig
from .generation import DePTGenerationMixin
from .hooks import Hooks
from .layer import DePTLayer


class DePTModel(AddedLayerTuner):
    """PEFT's tuner for DePT: it adds a layer with the parameters, and hooks that extend the inputs."""

    prefix = "dept_"
    tuner_layer_cls = DePTLayer
    why_unmergeable = (
        "DePT cannot be merged: the prompt is input of its own, and the update of an embedding depends on the token's"
        " position, while the embedding table has one row per token."
    )

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        _refuse_prompts_below(model)
        super().__init__(model, *args, **kwargs)

    def adapter_layer(self) -> DePTLayer:
        return unwrapped(self.model).dept

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        config, pretrained = cast(DePTConfig, self.peft_config[adapter_name]), unwrapped(model)
        if not hasattr(pretrained, "dept"):
            self._attach(pretrained)
        _complete(config, pretrained.dept_hooks.module)
        pretrained.dept.add(adapter_name, config, empty=low_cpu_mem_usage)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _attach(self, pretrained):
        module = family.adapted_module(pretrained)
        layer = DePTLayer(module)
        hooks = Hooks(module, layer)
        freeze(pretrained)
        pretrained.dept, pretrained.dept_hooks = layer, hooks
        if pretrained.can_generate():
            put_on(pretrained, DePTGenerationMixin)

    def detach(self) -> None:
        pretrained = unwrapped(self.model)
        if isinstance(pretrained, DePTGenerationMixin):
            take_off(pretrained, DePTGenerationMixin)
        for handle in pretrained.dept_hooks.handles:
            handle.remove()
        del pretrained.dept, pretrained.dept_hooks

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; refused below PEFT's prompt learning, which reaches only the model that PEFT wraps directly."""
        outer: Any = getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", None)
        learned = isinstance(outer, PeftModel) and outer.active_peft_config.is_prompt_learning
        if learned and not (is_encoder_decoder(unwrapped(self.model)) and kwargs.get("inputs_embeds") is not None):
            kind = outer.active_peft_config.peft_type.value
            raise ValueError(
                f"DePT: generate below {kind} would leave its prompt out: PEFT passes it only to the model that it"
                " wraps directly"
            )
        return self.model.generate(*args, **kwargs)


def _refuse_prompts_below(model):
    while isinstance(model, PeftModel):
        config = model.active_peft_config
        if config.is_prompt_learning:
            raise ValueError(
                f"DePT: model has {config.peft_type.value}, whose prompt would be lost below DePT's; put DePT on the"
                " model alone"
            )
        model = model.base_model.model


def _complete(config: DePTConfig, module: nn.Module) -> None:
    """Fill in the fields that depend on the model or a tokenizer, so that loading the configuration needs neither."""
    if config.insert_after_first is None:
        config.insert_after_first = family.inserts_after_first(module)
    if config.init_text is not None and config.init_token_ids is None and not config.inference_mode:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
        config.init_token_ids = tokenizer(config.init_text)["input_ids"]
        if not config.init_token_ids:
            raise ValueError(f"DePTConfig: init_text={config.init_text!r} has no tokens")
