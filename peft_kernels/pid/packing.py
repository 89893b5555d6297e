"""Linear layers on weights packed for oneDNN, on a CPU, without gradients.

A decoding step multiplies a few dozen rows by every weight of the decoder. With plain weights the library's matmul at so few rows
reaches a third to a half of the machine's matrix rate; with weights reordered once it reaches most of it, and the encoder gains a
little too (benchmarks/pid_generate.py). The packed copies cost the linear weights once more in memory and go with ``pid.disable``.

A packed copy is used only while its checksum is that of the weight. Addresses and version counters do not tell: fused optimizers,
``merge_adapter`` and everything else that writes through ``.data`` move neither. So every ``generate`` reads the weights once.
"""

from collections import Counter
from contextlib import contextmanager
from functools import partial
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..hf.call_state import CallState
from ..ops import native_library

ROWS_HINT = 32  # what oneDNN is told of the rows to come when it picks the layout

_lock = Lock()  # of the two below
_copies: WeakKeyDictionary[nn.Linear, tuple[tuple, Tensor]] = WeakKeyDictionary()
_users: Counter[nn.Linear] = Counter()  # layer -> how many ``generate`` calls run it on its packed weight
_packed = CallState()  # of this thread's ``generate``: layer -> packed weight


@contextmanager
def packed_linears(model: nn.Module):
    """Run the plain ``nn.Linear`` modules of encoder, decoder and head on packed weights: in this thread, within the context.

    Only where ``pid.enable(model, pack_weights=True)`` asked for it, on the CPU, in float32 or bfloat16, with the native library;
    elsewhere nothing happens.
    """
    outer = _packed.get()
    usable = model.pid_pack_weights and native_library.problem() is None and torch.backends.mkldnn.is_available()
    with _lock:
        weights = _fresh([layer for layer in _linears(model) if _packable(layer)]) if usable else {}
        for layer in weights:
            if not _users[layer]:
                layer.forward = partial(_forward, layer)
            _users[layer] += 1
    _packed.set({**(outer or {}), **weights})
    try:
        yield
    finally:
        _packed.set(outer)
        with _lock:
            for layer in weights:
                _users[layer] -= 1
                if not _users[layer]:
                    del _users[layer], layer.forward


def forget(model: nn.Module):
    """Free the packed copies of a model's weights."""
    with _lock:
        for layer in _linears(model):
            _copies.pop(layer, None)


def _linears(model):
    roots = [model.get_encoder(), model.get_decoder(), model.get_output_embeddings()]
    return dict.fromkeys(m for root in roots if root is not None for m in root.modules() if type(m) is nn.Linear)


def _packable(layer):
    weight = layer.weight
    return (
        type(weight) in (nn.Parameter, Tensor)  # no quantised or sharded weight
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.is_contiguous()
        and ("forward" not in layer.__dict__ or layer in _users)  # accelerate's hooks, for one, replace it
    )


def _fresh(layers) -> dict[nn.Linear, Tensor]:
    """The packed weight of every layer, packed again where the weight has changed."""
    if not layers:
        return {}
    weights = [layer.weight.detach() for layer in layers]
    packed = {}
    for layer, weight, checksum in zip(layers, weights, torch.ops.peft_kernels.checksums_cpu.default(weights).tolist()):
        contents = (checksum, weight.dtype, weight.shape)
        copy = _copies.get(layer)
        if copy is None or copy[0] != contents:
            copy = _copies[layer] = contents, torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        packed[layer] = copy[1]
    return packed


def _forward(layer, x):
    weight = None if torch.compiler.is_compiling() else (_packed.get() or {}).get(layer)
    # the packed product has no gradient and takes its weight's dtype alone
    if weight is None or torch.is_grad_enabled() or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")
