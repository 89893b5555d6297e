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
    if _only_looks_up(embedding):
        weight = gathered(embedding.weight)
        if type(weight) in (Tensor, nn.Parameter):
            return weight, family.embedding_scale(embedding), input_ids
    rows = embedding(input_ids)
    if rows.requires_grad and rows.is_leaf:  # enable_input_require_grads: this gradient is never read
        rows = rows.detach()
    return rows.flatten(0, 1), 1.0, torch.arange(input_ids.numel(), device=rows.device).view(input_ids.shape)


def gathered(parameter: Tensor) -> Tensor:
    """``parameter``, gathered if it is still sharded by FSDP, as in ``generate`` before a forward begins."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _only_looks_up(embedding):
    fsdp_hooks = 1 if hasattr(embedding, "unshard") else 0
    return (
        isinstance(embedding, nn.Embedding)
        and embedding.max_norm is None
        and embedding.weight.device.type != "meta"
        and len(embedding._forward_hooks) == len(embedding._forward_pre_hooks) == fsdp_hooks
        and "forward" not in vars(embedding)  # accelerate's hooks replace forward
    )
