"""Fusion of each layer's residual add and norm with the addition of the next layer's vectors."""

from torch import nn

from ..hf.call_state import CallState
from ..hf.class_swap import put_on, take_off
from ..hf.peft_method import unwrapped
from . import family
from .fused_layers import FusedAttention, FusedBlock, FusedOutput, FusedPreNorm, Fusion


def _bert(layer):
    return {layer.attention.output: (FusedOutput, False), layer.output: (FusedOutput, True)}


def _mpnet(layer):
    return {layer.attention: (FusedAttention, False), layer.output: (FusedOutput, True)}


def _distilbert(layer):
    return {layer: (FusedBlock, True)}


def _modernbert(layer):
    return {layer: (FusedPreNorm, True)}


# model_type -> the modules of a layer that add and normalise, with their mixin and whether they end the layer
_FUSIBLE = {
    "bert": _bert,
    "camembert": _bert,
    "distilbert": _distilbert,
    "electra": _bert,
    "modernbert": _modernbert,
    "mpnet": _mpnet,
    "roberta": _bert,
    "xlm-roberta": _bert,
}


def fuse(model: nn.Module) -> None:
    """Fuse add, norm and injection in the layers of ``model``.

    The layers run ``add_layer_norm_inject`` (post-norm) or ``add_inject_layer_norm`` (pre-norm). Results are those of
    the unfused model, within rounding. The model may have a PASTA adapter, get one later, or have none. A layer's
    output already contains the vectors that the next layer would add; hooks on norms do not run.

    A forward under autocast and a layer under gradient checkpointing take the model's own path. If hidden states are
    requested, the next layer adds its vectors itself, so that the recorded states do not contain them.

    Args:
        model: a transformers model, or a ``PeftModel`` of it: BERT, CamemBERT, DistilBERT, ELECTRA, ModernBERT, MPNet,
            RoBERTa, XLM-R.

    Raises:
        ValueError: the model is of another type, computes feed-forward layers in chunks, or is already fused.
    """
    module = _encoder(model)
    model_type = module.config.model_type
    if model_type not in _FUSIBLE:
        raise ValueError(f"fuse: model must be one of {sorted(_FUSIBLE)}, got {model_type!r}")
    if getattr(module.config, "chunk_size_feed_forward", 0):
        raise ValueError(f"fuse: chunk_size_feed_forward must be 0, got {module.config.chunk_size_feed_forward}")
    if is_fused(model):
        raise ValueError(f"fuse: model must not be fused, got {type(module).__name__} fused already")
    layers, normed = family.passes_of(module), CallState()
    for layer, following in zip(layers, [*layers[1:], None]):
        for part, (mixin, is_last) in _FUSIBLE[model_type](layer).items():
            part.pasta_fusion = Fusion(layer, following if is_last else None, normed)
            put_on(part, mixin)


def unfuse(model: nn.Module) -> None:
    """Undo ``fuse``: the layers of ``model`` take their own path again.

    Raises:
        ValueError: the model is not fused.
    """
    if not is_fused(model):
        raise ValueError(f"unfuse: model must be fused, got {type(_encoder(model)).__name__} without fused layers")
    module = _encoder(model)
    for layer in family.passes_of(module):
        for part, (mixin, _) in _FUSIBLE[module.config.model_type](layer).items():
            take_off(part, mixin)
            del part.pasta_fusion


def is_fused(model: nn.Module) -> bool:
    return any(hasattr(m, "pasta_fusion") for m in _encoder(model).modules())


def _encoder(model):
    return family.adapted_module(unwrapped(model))
