"""Linear layers on weights packed for oneDNN, on a CPU, without gradients.

A decoding step multiplies a few dozen rows by every weight of the decoder. With plain weights the library's matmul at
so few rows reaches a third to a half of the machine's matrix rate; with weights reordered once it reaches most of it,
and the encoder gains a little too (benchmarks/pid_generate.py). The packed copies double the memory of the linear
weights; ``pid.disable`` frees them.

A packed copy is used only while its checksum matches the weight. Addresses and version counters are not enough: fused
optimizers, ``merge_adapter`` and everything else that writes through ``.data`` change neither. So every ``generate``
reads the weights once.
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

ROWS_HINT = 32  # the number of input rows for which oneDNN picks the layout

_lock = Lock()  # guards _copies and _users
_copies: WeakKeyDictionary[nn.Linear, tuple[tuple, Tensor]] = WeakKeyDictionary()  # layer -> contents, packed weight
_users: Counter[nn.Linear] = Counter()  # layer -> number of ``generate`` calls that run it on its packed weight
_packed = CallState()  # layer -> packed weight, in this thread's ``generate``


@contextmanager
def packed_linears(model: nn.Module):
    """Context in which the plain ``nn.Linear`` modules of the model run on packed weights, in this thread.

    Does nothing unless the model was enabled with ``pack_weights=True``, the native library is built, and the weights
    are float32 or bfloat16 on a CPU.
    """
    outer = _packed.get()
    usable = model.pid_pack_weights and native_library.load_error() is None and torch.backends.mkldnn.is_available()
    with _lock:
        weights = _packed_weights([layer for layer in _linears(model) if _packable(layer)]) if usable else {}
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
        and ("forward" not in layer.__dict__ or layer in _users)  # accelerate's hooks replace forward
    )


def _packed_weights(layers) -> dict[nn.Linear, Tensor]:
    """The packed weight of every layer; weights that have changed are packed again."""
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
    # the packed matmul has no gradient and takes only the dtype of its weight
    if weight is None or torch.is_grad_enabled() or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")
