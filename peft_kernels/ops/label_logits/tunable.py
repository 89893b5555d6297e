"""The configs that `peft-kernels tune` searches, and the calls in which it times them."""

from functools import partial

import torch

from ..problem import RandomInputs, Setting
from ..tuned import Kernel
from . import triton

KERNELS = {
    "forward": Kernel(("bytes", "words"), {"BW": (1, 32), "BD": (64, 4096)}),
    "backward": Kernel(("bytes",), {"BW": (1, 32), "BD": (64, 2048)}),
}


def targets(setting: Setting):
    """Yields (kernel, key, default config, maker of a call) for every row of the tables of default configs."""
    size = setting.dtype.itemsize
    for config in triton.FORWARD:
        make = partial(_logits_forward, words=config.words)
        yield "forward", (size, config.words), triton.launch_options(config), make
    yield "backward", (size,), triton.launch_options(triton.BACKWARD), _logits_backward


def _logits_forward(setting, words):
    random, sizes = RandomInputs.of(setting), setting.sizes
    hidden, weight = random.normal(sizes.texts, sizes.width), random.normal(sizes.vocabulary, sizes.width)
    label_ids = random.integers(0, sizes.vocabulary, 1, words)
    return lambda: (triton.forward(hidden, weight, label_ids, None, None),)


def _logits_backward(setting):
    random, sizes = RandomInputs.of(setting), setting.sizes
    words = triton.FORWARD[-1].words
    grad = random.normal(sizes.texts, 1, words, dtype=torch.float32)
    weight = random.normal(sizes.vocabulary, sizes.width)
    label_ids = random.integers(0, sizes.vocabulary, 1, words)
    return lambda: (triton.backward(grad, weight, label_ids),)
