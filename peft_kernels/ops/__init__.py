"""Operators: tensors in, tensors out."""

from .add_layer_norm_inject import add_inject_layer_norm, add_layer_norm_inject
from .decomposed_prompt_embedding import decomposed_prompt_embedding
from .label_cross_attention import label_cross_attention
from .label_logits import label_logits
from .prototype_scores import prototype_cross_entropy, prototype_objective, prototype_scores
from .shared_cross_attention import shared_cross_attention
from .special_tokens import special_token_add, special_token_add_, special_token_slots

# by method: PiD, DePT, PASTA, DecT, Y-Tuning
__all__ = [
    "shared_cross_attention",
    "decomposed_prompt_embedding",
    "special_token_slots",
    "special_token_add",
    "special_token_add_",
    "add_layer_norm_inject",
    "add_inject_layer_norm",
    "label_logits",
    "prototype_scores",
    "prototype_cross_entropy",
    "prototype_objective",
    "label_cross_attention",
]
