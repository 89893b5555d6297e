"""The configs that `peft-kernels tune` searches, and the calls in which it times them."""

from functools import partial

import torch

from ..problem import RandomInputs, Setting
from ..tuned import Kernel
from . import triton

KERNELS = {
    "scores": Kernel(("bytes", "queries"), {"BN": (16, 256), "BK": (16, 128)}),
    "pool": Kernel(("bytes", "queries"), {"BD": (16, 256), "BN": (16, 128)}),
    "softmax": Kernel((), {"BN": (16, 1024), "BQ": (1, 64)}),
    "softmax_backward": Kernel((), {"BN": (16, 1024), "BQ": (1, 64)}),
}


def targets(setting: Setting):
    """Yields (kernel, key, default config, maker of a call) for every row of the tables of default configs."""
    unit, size = triton.unit_of(setting.device, setting.dtype), setting.dtype.itemsize
    blocks = [block for config_unit, block in triton.CONFIGS if config_unit == unit]
    for block in blocks:
        pool = partial(_pool, queries=block)
        yield "scores", (size, block), triton.scores_options(unit, block), pool
        yield "pool", (size, block), triton.pool_options(unit, block), pool
    if setting.dtype == torch.float32:
        yield "softmax", (), triton.SOFTMAX, partial(_pool, queries=blocks[-1])
        yield "softmax_backward", (), triton.SOFTMAX, partial(_pool_backward, queries=blocks[-1])


def _pool_inputs(setting, queries):
    """Draws queries (1, 1, S, d), features (B, n, d) and the pooled features' gradient (1, B, S, d) of one head."""
    random, sizes = RandomInputs.of(setting), setting.sizes
    features = random.normal(sizes.batch, sizes.tokens, sizes.width)
    return random.normal(1, 1, queries, sizes.width), features, random.normal(1, sizes.batch, queries, sizes.width)


def _pool(setting, queries):
    query, features, _ = _pool_inputs(setting, queries)
    return lambda: triton.pool(query, features, None, None, setting.sizes.width**-0.5, True)


def _pool_backward(setting, queries):
    query, features, grad = _pool_inputs(setting, queries)
    _, weights = triton.pool(query, features, None, None, setting.sizes.width**-0.5, True)
    return lambda: (triton.pool_backward(grad, features, weights, None, None, setting.sizes.width**-0.5, True),)
