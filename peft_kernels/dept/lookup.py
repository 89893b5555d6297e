"""Lookup of input embeddings, also in a module that is hooked, wrapped or sharded."""

import torch
from torch import Tensor, nn

from . import family


def table(embedding: nn.Module, input_ids: Tensor) -> tuple[Tensor, float, Tensor]:
    """A table (V, d), the factor from its rows to the output of ``embedding``, and (B, L) row indices of the tokens.

    If the module's forward only looks up and scales, the table is its weight, and the operator reads each row once.
    Otherwise the module is called and its output is the table: hooks may load the weight (accelerate's offload, FSDP's
    shards) or change the output (NEFTune), wrappers may add to it (adapters, trained copies), and quantised weights are
    not plain tensors.
    """
    if _looks_up_alone(embedding):
        weight = whole(embedding.weight)
        if type(weight) in (Tensor, nn.Parameter):
            return weight, family.embedding_scale(embedding), input_ids
    rows = embedding(input_ids)
    if rows.requires_grad and rows.is_leaf:  # enable_input_require_grads: this gradient is never read
        rows = rows.detach()
    return rows.flatten(0, 1), 1.0, torch.arange(input_ids.numel(), device=rows.device).view(input_ids.shape)


def whole(parameter: Tensor) -> Tensor:
    """``parameter``, gathered if it is sharded by FSDP and the forward of its FSDP module has not begun, as in
    ``generate``.
    """
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _looks_up_alone(embedding):
    of_fsdp = 1 if hasattr(embedding, "unshard") else 0
    return (
        isinstance(embedding, nn.Embedding)
        and embedding.max_norm is None
        and embedding.weight.device.type != "meta"
        and len(embedding._forward_hooks) == len(embedding._forward_pre_hooks) == of_fsdp
        and "forward" not in vars(embedding)  # accelerate's hooks replace forward
    )
