"""The mixins that ``fuse`` puts on the modules of a layer."""

import torch
from torch import Tensor, nn

from ..hf.call_state import CallState
from ..hf.class_swap import Swapped
from ..ops import add_inject_layer_norm, add_layer_norm_inject
from .injection import Injection


class Fusion:
    """The place of a fused module in its model.

    Args:
        layer: the layer of the module.
        following: the next layer, if the module ends its own; otherwise None.
        normed: shared by all layers; in pre-norm models it holds the previous layer's sum and its norm.
    """

    def __init__(self, layer: nn.Module, following: nn.Module | None, normed: CallState):
        self.layer, self.following, self.normed = layer, following, normed

    def applies(self, x: Tensor, *norms: nn.Module) -> bool:
        """Whether the fused path applies: not under autocast, whose norms change dtypes, nor in checkpointed layers."""
        checkpointed = getattr(self.layer, "gradient_checkpointing", False) and self.layer.training
        return (
            not checkpointed
            and not torch.is_autocast_enabled(x.device.type)
            and all(_is_plain(norm, x.device) for norm in norms)
        )

    def pending(self) -> Injection | None:
        """The injection into the following layer."""
        state = getattr(self.following, "pasta_state", None)
        return None if state is None else state.call.get() or None

    def ahead(self, device: torch.device) -> dict:
        """The following layer's vectors, as arguments of the operator; empty if this layer's output is recorded."""
        injection = self.pending()
        if injection is None or injection.recorded:
            return {}
        return injection.ahead(self.following.pasta_indices[0], device)


class FusedOutput(Swapped):
    """Mixin for BertSelfOutput and BertOutput."""

    pasta_fusion: Fusion

    def forward(self, hidden_states, input_tensor):
        fusion = self.pasta_fusion
        if not fusion.applies(input_tensor, self.LayerNorm):
            return super().forward(hidden_states, input_tensor)
        hidden_states = self.dropout(self.dense(hidden_states))
        return add_layer_norm_inject(
            hidden_states, input_tensor, **_norm(self.LayerNorm), **fusion.ahead(input_tensor.device)
        )


class FusedAttention(Swapped):
    """Mixin for MPNetAttention."""

    pasta_fusion: Fusion

    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
        if not self.pasta_fusion.applies(hidden_states, self.LayerNorm):
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
        attended, *others = self.attn(hidden_states, attention_mask, position_bias, output_attentions=output_attentions)
        return add_layer_norm_inject(self.dropout(attended), hidden_states, **_norm(self.LayerNorm)), *others


class FusedBlock(Swapped):
    """Mixin for DistilBERT's TransformerBlock."""

    pasta_fusion: Fusion

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        fusion = self.pasta_fusion
        if not fusion.applies(hidden_states, self.sa_layer_norm, self.output_layer_norm):
            return super().forward(hidden_states, attention_mask, **kwargs)
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        attended = add_layer_norm_inject(attended, hidden_states, **_norm(self.sa_layer_norm))
        return add_layer_norm_inject(
            self.ffn(attended), attended, **_norm(self.output_layer_norm), **fusion.ahead(hidden_states.device)
        )


class FusedPreNorm(Swapped):
    """Mixin for ModernBertEncoderLayer.

    It fuses the sum that ends the layer with the next layer's norm, and passes both to the next layer.
    """

    pasta_fusion: Fusion

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        fusion = self.pasta_fusion
        ready, normed = fusion.normed.get() or (None, None)
        fusion.normed.set(None)
        if not fusion.applies(hidden_states, self.mlp_norm):
            return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)
        if ready is not hidden_states:
            normed = self.attn_norm(hidden_states)
        attended, _ = self.attn(
            normed, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
        )
        normed, hidden_states = add_inject_layer_norm(attended, hidden_states, **_norm(self.mlp_norm))
        update, following, injection = self.mlp(normed), fusion.following, fusion.pending()
        recorded = injection is not None and injection.recorded
        if following is None or recorded or not following.pasta_fusion.applies(update, following.attn_norm):
            return hidden_states + update
        normed, hidden_states = add_inject_layer_norm(
            update, hidden_states, **_norm(following.attn_norm), **fusion.ahead(hidden_states.device)
        )
        fusion.normed.set((hidden_states, normed))
        return hidden_states


def _is_plain(norm, device):
    """Whether the norm's weight can be read directly: it is not wrapped, sharded, offloaded or on another device."""
    return type(norm) is nn.LayerNorm and type(norm.weight) in (nn.Parameter, Tensor) and norm.weight.device == device


def _norm(norm: nn.LayerNorm) -> dict:
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
