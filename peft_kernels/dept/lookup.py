"""Rows of an input embedding, whatever has been done to the module."""

import torch
from torch import Tensor, nn

from . import family


def table(embedding: nn.Module, input_ids: Tensor) -> tuple[Tensor, float, Tensor]:
    """A table (V, d); the factor between its rows and what ``embedding`` returns; and (B, L) ids that look the tokens up in it.

    Where the module's own weight and factor are all that its forward knows, the operator reads each row from there, once. Otherwise the
    module is called and its output is the table: hooks bring in a weight that is kept elsewhere (accelerate's offload, FSDP's shards)
    or change the output (NEFTune), wrappers add to it (adapters, trained copies), and quantised weights are no plain tensors.
    """
    if _looks_up_alone(embedding):
        weight = whole(embedding.weight)
        if type(weight) in (Tensor, nn.Parameter):
            return weight, family.embedding_scale(embedding), input_ids
    rows = embedding(input_ids)
    if rows.requires_grad and rows.is_leaf:  # enable_input_require_grads: nobody reads this gradient
        rows = rows.detach()
    return rows.flatten(0, 1), 1.0, torch.arange(input_ids.numel(), device=rows.device).view(input_ids.shape)


def whole(parameter: Tensor) -> Tensor:
    """``parameter``, gathered where it lies in a shard of FSDP whose forward has not begun: around what is asked, or around ``generate``."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _looks_up_alone(embedding):
    of_fsdp = 1 if hasattr(embedding, "unshard") else 0
    return (
        isinstance(embedding, nn.Embedding)
        and embedding.max_norm is None
        and embedding.weight.device.type != "meta"
        and len(embedding._forward_hooks) == len(embedding._forward_pre_hooks) == of_fsdp
        and "forward" not in vars(embedding)  # accelerate puts its own there
    )
