"""The configs that `peft-kernels tune` searches, and the calls in which it times them."""

from functools import partial

import torch

from ..problem import RandomInputs, Setting
from ..special_tokens.tunable import random_vectors, spread_slots
from ..tuned import Kernel
from . import triton

_ROWS = {"BR": (1, 64)}
KERNELS = {
    "forward": Kernel(("bytes", "columns"), _ROWS),
    "backward": Kernel(("bytes", "columns"), _ROWS),
}


def targets(setting: Setting):
    """Yields (kernel, key, default config, maker of a call) for every row of the tables of default configs."""
    for width in setting.sizes.norm_widths:
        default = triton.row_options(width)
        for kernel, make in (("forward", _norm_forward), ("backward", _norm_backward)):
            yield kernel, (setting.dtype.itemsize, default["BD"]), default, partial(make, width=width)


def _norm_inputs(setting, width):
    """Draws inputs with the same number of elements for every width."""
    random, sizes = RandomInputs.of(setting), setting.sizes
    x, residual = (
        random.normal(sizes.batch, max(sizes.specials, sizes.tokens * sizes.width // width), width) for _ in range(2)
    )
    weight, bias = (random.normal(width, dtype=torch.float32) for _ in range(2))
    return x, residual, weight, bias, random_vectors(random, setting, width), spread_slots(setting)


def _norm_forward(setting, width):
    inputs = _norm_inputs(setting, width)
    return lambda: triton.forward(*inputs, None, 1e-5, False, False, 0.0, None, True)


def _norm_backward(setting, width):
    inputs = _norm_inputs(setting, width)
    grad, _, weight, _, _, slots = inputs
    _, *saved = triton.forward(*inputs, None, 1e-5, False, False, 0.0, None, True)
    arguments = grad, None, *saved, weight, slots, None, 1, setting.sizes.specials, False, False, 0.0, None
    return lambda: triton.backward(*arguments, True, False)
