"""Every operator's kernels: the variants that Triton compiles, and those of CUDA C++ by name. Importing it needs Triton."""

from functools import cache

from ..variant import Variant
from . import (
    add_layer_norm_inject,
    decomposed_prompt_embedding,
    label_cross_attention,
    label_logits,
    prototype_scores,
    shared_cross_attention,
    special_tokens,
)

CUDA_KERNELS = {
    kernel: module.OPERATOR for module in (decomposed_prompt_embedding, special_tokens, add_layer_norm_inject) for kernel in module.CUDA_KERNELS
}


@cache
def triton_variants() -> dict[str, Variant]:
    """By name."""
    modules = (
        shared_cross_attention, decomposed_prompt_embedding, special_tokens, add_layer_norm_inject,
        label_logits, prototype_scores, label_cross_attention,
    )  # fmt: skip
    variants = [variant for module in modules for variant in module.variants()]
    named = {variant.name: variant for variant in variants}
    assert len(named) == len(variants), "two variants have the same name"
    return named
