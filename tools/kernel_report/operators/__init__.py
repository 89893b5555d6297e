"""Every operator's kernels: the cases that Triton compiles, and those of CUDA C++ by name. Importing it needs Triton."""

from functools import cache

from ..case import Case
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
def triton_cases() -> dict[str, Case]:
    """By name."""
    modules = (
        shared_cross_attention, decomposed_prompt_embedding, special_tokens, add_layer_norm_inject,
        label_logits, prototype_scores, label_cross_attention,
    )  # fmt: skip
    cases = [case for module in modules for case in module.cases()]
    named = {case.name: case for case in cases}
    assert len(named) == len(cases), "two cases have the same name"
    return named
