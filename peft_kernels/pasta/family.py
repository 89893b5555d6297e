"""Properties of a model that PASTA needs: its layers, in the order in which a forward runs them."""

import inspect

from torch import nn

from ..hf.peft_method import check_pretrained, is_causal, is_encoder_decoder

# In these families a layer's input is the fresh result of a norm, a dropout, a linear layer or a residual add, none of
# which saves its result for backward, and only the layer reads it. DeBERTa is excluded: its encoder keeps every hidden
# state and reads the first again.
IN_PLACE = ("albert", "bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta")
_TRANSPOSED = ("squeezebert",)  # layers take (B, d, S)


def adapted_module(model: nn.Module) -> nn.Module:
    """The encoder: ``model`` below its head.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: it is not an encoder of tokens.
    """
    check_pretrained("PASTA", model)
    module, name = model.base_model, type(model).__name__
    if is_encoder_decoder(module):
        raise ValueError(
            f"PASTA: model must be an encoder, but {name} has a decoder as well, which special tokens of the input do"
            " not reach"
        )
    # XLM and Flaubert generate, but attend in both directions
    bidirectional = getattr(module.config, "causal", None) is False
    if not bidirectional and (is_causal(model) or is_causal(module)):
        raise ValueError(
            f"PASTA: model must be an encoder, but {name} is a decoder, whose tokens see only earlier tokens"
        )
    if module.config.model_type in _TRANSPOSED:
        raise ValueError(f"PASTA: the layers of {name} must take hidden states (B, S, d), but take (B, d, S)")
    if (streams := getattr(module.config, "hc_mult", None)) is not None:
        raise ValueError(
            f"PASTA: the layers of {name} must take hidden states (B, S, d), but take (B, S, {streams}, d)"
        )
    if getattr(module.config, "quant_mode", False):
        raise ValueError(
            f"PASTA: the layers of {name} with quant_mode=True compute with integers, to which no vector can be added"
        )
    return module


def passes_of(module: nn.Module) -> list[nn.Module]:
    """The layer of each of the L passes of a forward; ALBERT's layers repeat.

    Raises:
        ValueError: the model has no list of ``num_hidden_layers`` layers that take hidden states, or several, or a
            layer occurs twice.
    """
    model, depth = type(module).__name__, getattr(module.config, "num_hidden_layers", None)
    if module.config.model_type == "albert":
        groups = module.encoder.albert_layer_groups
        return [layer for i in range(depth) for layer in groups[int(i / (depth / len(groups)))].albert_layers]
    if depth is None:
        raise ValueError(
            f"PASTA: {model} must be an encoder of text with num_hidden_layers in its configuration, got a"
            f" {module.config.model_type}"
        )
    lists = [(name, m) for name, m in module.named_modules() if _is_layer_list(m, depth)]
    lists = [(name, m) for name, m in lists if not any(name.startswith(f"{outer}.") for outer, _ in lists)]
    if len(lists) != 1:
        names = [name for name, _ in lists] or "none"
        raise ValueError(
            f"PASTA: {model} must have one ModuleList of {depth} layers that take hidden_states first, got {names}"
        )
    (name, layers), *_ = lists
    if len(set(layers)) != len(layers):
        raise ValueError(
            f"PASTA: every layer of {model} must be a module of its own, but {name} has {len(set(layers))} for"
            f" {len(layers)} passes"
        )
    return list(layers)


def _is_layer_list(module, depth):
    return (
        isinstance(module, nn.ModuleList)
        and len(module) == depth
        and all(next(iter(inspect.signature(m.forward).parameters), None) == "hidden_states" for m in module)
    )
