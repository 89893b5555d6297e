"""The tuner, by which PEFT adds and removes PASTA adapters."""

from typing import cast

from torch import Tensor, nn
from transformers import AutoTokenizer

from ..hf.class_swap import put_on, take_off
from ..hf.peft_method import AddedLayerTuner, freeze, unwrapped
from . import family
from .config import PASTAConfig
from .hooks import Hooks
from .injection import InjectingLayer, indices_of
from .layer import PASTALayer


class PASTAModel(AddedLayerTuner):
    """PEFT's tuner for PASTA: it adds a layer with the vectors, which the encoder's layers add to their input.

    In the families of ``family.IN_PLACE``, vectors are added in place: a layer's output, also one that a hook has kept,
    contains the next layer's vectors afterwards. With ``output_hidden_states=True`` they are added out of place, and
    the returned states do not contain them.
    """

    prefix = "pasta_"
    tuner_layer_cls = PASTALayer
    why_unmergeable = (
        "PASTA cannot be merged: its vectors are added to the hidden states of special tokens alone, and no weight of"
        " the model depends on their positions."
    )

    def adapter_layer(self) -> PASTALayer:
        return unwrapped(self.model).pasta

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        config, adapted = cast(PASTAConfig, self.peft_config[adapter_name]), unwrapped(model)
        module = family.adapted_module(adapted)
        _complete(config, adapted)
        if not isinstance(getattr(adapted, "pasta", None), PASTALayer):
            self._attach(adapted, module)
        adapted.pasta.add(adapter_name, config, empty=low_cpu_mem_usage)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _attach(self, model, module):
        passes = family.passes_of(module)
        freeze(model)
        model.pasta = PASTALayer(module, len(passes))
        model.pasta_hooks = Hooks(module, model.pasta)
        for layer, indices in indices_of(passes).items():
            layer.pasta_state, layer.pasta_indices = model.pasta_hooks.state, indices
            put_on(layer, InjectingLayer)

    def detach(self) -> None:
        model = unwrapped(self.model)
        for layer in indices_of(family.passes_of(model.base_model)):
            take_off(layer, InjectingLayer)
            del layer.pasta_state, layer.pasta_indices
        for handle in model.pasta_hooks.handles:
            handle.remove()
        del model.pasta, model.pasta_hooks


def _complete(config: PASTAConfig, model) -> None:
    """Fill in the fields that depend on the model or a tokenizer, so that loading needs no tokenizer."""
    if config.special_token_ids is None:
        config.special_token_ids = _special_ids(config, model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if max(config.special_token_ids) >= vocabulary:
        raise ValueError(
            f"PASTAConfig: special_token_ids must lie in [0, {vocabulary}), got {config.special_token_ids}"
        )


def _special_ids(config, model):
    source = config.tokenizer_name_or_path or model.name_or_path
    advice = "give special_token_ids, or a tokenizer_name_or_path with cls_token and sep_token"
    if not source:
        raise ValueError(f"PASTAConfig: {advice}: the model has no name_or_path to load a tokenizer from")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=config.tokenizer_name_or_path is None)
    except (OSError, ValueError) as error:
        raise ValueError(f"PASTAConfig: {advice}: no tokenizer could be loaded from {source!r}") from error
    first = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    last = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    ids = list(dict.fromkeys(i for i in (first, last) if i is not None))
    if not ids:
        raise ValueError(
            f"PASTAConfig: {advice}: the tokenizer of {source!r} has none of them, nor bos_token or eos_token"
        )
    return ids
