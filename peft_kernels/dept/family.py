"""Properties of a model that DePT needs: the module that embeds tokens, the position table, the prompt's place."""

import inspect
import re

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..hf.peft_method import check_pretrained, is_causal, is_encoder_decoder

_PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)$")
_MODALITY = re.compile(r"pixel_values|input_features|input_values|image_|video_|audio_|mm_encoder_outputs")
_POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def adapted_module(model: nn.Module) -> nn.Module:
    """The module whose inputs are extended by the prompt.

    This is the whole model if it can generate: the loss then counts the first token, which the prompt predicts.
    Otherwise it is the model below the head, so that the head, its labels and its spans never see the prompt.
    """
    _check(model)
    return model if model.can_generate() else model.base_model


def reader_of(module: nn.Module) -> nn.Module:
    """The submodule that turns input ids into embeddings."""
    return module.get_encoder() if is_encoder_decoder(module) else module


def embedding_of(module: nn.Module) -> nn.Embedding:
    for part in (reader_of(module), module):  # FSMT's encoder names no input embedding
        try:
            return part.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
    raise ValueError(
        f"DePT: {type(module).__name__} must have an input embedding, but its get_input_embeddings names none"
    )


def embedding_scale(embedding: nn.Embedding) -> float:
    """The factor from the table's rows to the embedding module's output."""
    scale = getattr(embedding, "embed_scale", None)
    if isinstance(scale, torch.Tensor):
        # Gemma rounds the scale to the table's dtype; reading its Python float does not synchronize with the device
        scale = torch.tensor(embedding.scalar_embed_scale).to(embedding.weight.dtype).item()
    return 1.0 if scale is None else float(scale)


def inserts_after_first(module: nn.Module) -> bool:
    """Whether the model is an encoder that reads a summary from its first token."""
    return (
        module.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not is_encoder_decoder(module)
        and not is_causal(module)
    )


def first_position(module: nn.Module) -> int:
    """The position of the first token: padding_idx + 1 in RoBERTa and its derivatives, else 0."""
    embeddings = getattr(module.base_model, "embeddings", None)
    return embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_inputs_embeds") else 0


def takes_position_ids(module: nn.Module) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters


def placeholder_ids(module: nn.Module) -> list[int]:
    """The ids of tokens that a model replaces by features of images, video or audio.

    A model that gets embeddings instead of ids recognizes these tokens by their embedding.
    """
    return [v for k, v in module.config.to_dict().items() if _PLACEHOLDER.match(k) and isinstance(v, int)]


def is_multimodal(kwargs: dict) -> bool:
    """Whether a call has inputs other than text."""
    return any(value is not None and _MODALITY.match(name) for name, value in kwargs.items())


def keeps_rope_deltas(module: nn.Module) -> bool:
    """Whether a model computes image positions from its ids and, without ids, reuses the shift of the previous call."""
    return hasattr(module.base_model, "rope_deltas")


def has_position_table(module: nn.Module) -> bool:
    """Whether the model has absolute position embeddings."""
    return bool(_position_tables(module))


def max_columns(module: nn.Module) -> int | None:
    """The number of rows of the position table, or None if positions are computed."""
    if not any(isinstance(table, nn.Embedding) for table in _position_tables(module)):
        return None
    config = getattr(reader_of(module), "config", module.config)
    limit = getattr(config, "max_position_embeddings", None)
    return limit if limit is None else limit - first_position(module)


def _position_tables(module):
    return [m for name, m in reader_of(module).named_modules() if name.rpartition(".")[2] in _POSITION_TABLES]


def _check(model):
    name = type(model).__name__
    check_pretrained("DePT", model)
    module = model if model.can_generate() else model.base_model
    if "inputs_embeds" not in inspect.signature(module.forward).parameters:
        raise ValueError(f"DePT: the prompt enters through inputs_embeds, which {type(module).__name__} does not take")
    embedding = embedding_of(module)
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"DePT: the input embedding of {name} must be an nn.Embedding, got {type(embedding).__name__}")
    weight = embedding.weight
    if weight.device.type != "meta" and type(weight) in (torch.Tensor, nn.Parameter):  # others are called
        ids = torch.arange(min(4, embedding.num_embeddings), device=weight.device)
        with torch.no_grad():
            rows, expected = embedding(ids), weight[ids] * getattr(embedding, "embed_scale", 1.0)
        if rows.shape != expected.shape or not torch.allclose(rows, expected.to(rows.dtype)):
            raise ValueError(
                f"DePT: the input embedding of {name}, {type(embedding).__name__}, does more than look up and scale"
                " rows"
            )
