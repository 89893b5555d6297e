"""The problems on which every operator is measured, a module for each package of operators."""

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..suite import Operator

MODULES = {
    "shared_cross_attention": ("shared_cross_attention",),
    "decomposed_prompt_embedding": ("decomposed_prompt_embedding",),
    "special_tokens": ("special_token_slots", "special_token_add", "special_token_add_"),
    "add_layer_norm_inject": ("add_layer_norm_inject", "add_inject_layer_norm"),
    "label_logits": ("label_logits",),
    "prototype_scores": ("prototype_scores", "prototype_cross_entropy", "prototype_objective"),
    "label_cross_attention": ("label_cross_attention",),
}
NAMES = tuple(name for names in MODULES.values() for name in names)


def check_names(names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: not the name of an operator.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"expected an operator, one of {', '.join(NAMES)}; got {name!r}")


def operator(name: str) -> "Operator":
    """
    Raises:
        ValueError: not the name of an operator.
    """
    check_names([name])
    module = next(module for module, names in MODULES.items() if name in names)
    return import_module(f".{module}", __name__).OPERATORS[name]
