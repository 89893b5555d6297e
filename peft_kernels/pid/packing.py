"""Linear layers on weights packed for oneDNN, on a CPU, without gradients.

A decoding step multiplies a few dozen rows by every weight of the decoder. With plain weights the library's product at so few rows
reaches a third to a half of the machine's matrix rate; with weights reordered once it reaches most of it, and the encoder gains a
little too (benchmarks/pid_generate.py). The packed copies cost the linear weights once more in memory and go with ``pid.disable``.
"""

from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

ROWS_HINT = 32  # what oneDNN is told of the rows to come when it picks the layout

_packed: WeakKeyDictionary[nn.Linear, tuple[tuple, Tensor]] = WeakKeyDictionary()


@contextmanager
def packed_linears(model: nn.Module):
    """Run the plain ``nn.Linear`` modules of encoder, decoder and head on packed weights within the context.

    Only where ``pid.enable(model, pack_weights=True)`` asked for it, on the CPU, in float32 or bfloat16; elsewhere nothing happens.
    """
    layers = [m for m in _linears(model) if _packable(m)] if model.pid_pack_weights else []
    try:
        for layer in layers:
            layer.forward = partial(_forward, layer, _weight(layer))
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def forget(model: nn.Module):
    """Free the packed copies of a model's weights."""
    for layer in _linears(model):
        _packed.pop(layer, None)


def _linears(model):
    roots = [model.get_encoder(), model.get_decoder(), model.get_output_embeddings()]
    return dict.fromkeys(m for root in roots if root is not None for m in root.modules() if type(m) is nn.Linear)


def _packable(layer):
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and not weight.is_inference()  # which does not count its changes
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and "forward" not in layer.__dict__
    )


def _weight(layer) -> Tensor:
    weight = layer.weight
    version = (weight.data_ptr(), weight._version, weight.dtype)
    known = _packed.get(layer)
    if known is None or known[0] != version:
        known = _packed[layer] = version, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
    return known[1]


def _forward(layer, weight, x):
    if torch.is_grad_enabled():  # the packed product has no gradient
        return nn.functional.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")
