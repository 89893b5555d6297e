"""The configs that `peft-kernels tune` searches, and the calls in which it times them."""

import math
from functools import partial

import torch

from ..problem import RandomInputs, Setting
from ..tuned import Kernel
from . import triton

_ROWS = {"BR": (1, 64)}
KERNELS = {
    "forward": Kernel(("columns",), _ROWS),
    "backward": Kernel(("columns",), _ROWS),
    "prototypes": Kernel(("columns",), _ROWS),
    "cross_entropy": Kernel(("columns",), _ROWS),
}


def targets(setting: Setting):
    """Yields (kernel, key, default config, maker of a call) for every row of the tables of default configs."""
    makers = {
        "forward": _scores,
        "backward": _scores_backward,
        "prototypes": _scores_backward,
        "cross_entropy": _cross_entropy,
    }
    for width in setting.sizes.prototype_widths if setting.dtype == torch.float32 else ():
        default = triton.row_options(width)
        for kernel, make in makers.items():
            yield kernel, (default["BD"],), default, partial(make, width=width)


def _score_inputs(setting, width):
    random, (texts, classes) = RandomInputs.of(setting), (setting.sizes.texts, setting.sizes.classes)
    rows = random.normal(texts, width), random.normal(classes, width) / math.sqrt(width)
    return *rows, random.normal(classes), random.normal(texts, classes), random.integers(0, classes, texts)


def _scores(setting, width):
    *inputs, _ = _score_inputs(setting, width)
    return lambda: (triton.forward(*inputs, 1.0),)


def _scores_backward(setting, width):
    projected, prototypes, _, grad, _ = _score_inputs(setting, width)
    return lambda: triton.backward(grad, projected, prototypes)


def _cross_entropy(setting, width):
    *inputs, labels = _score_inputs(setting, width)
    return lambda: triton.cross_entropy(*inputs, 1.0, labels)
