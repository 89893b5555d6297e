"""The configs that `peft-kernels tune` searches, and the calls in which it times them."""

from functools import partial

import torch

from ..problem import RandomInputs, Setting
from ..tuned import Kernel
from . import triton

KERNELS = {
    "product": Kernel(("bytes",), {"BP": (16, 128), "BD": (16, 512), "BR": (16, 64)}, tiles=3),
    "delta": Kernel(("bytes",), {"BP": (1, 128), "BD": (16, 1024)}, tiles=2),
    "backward": Kernel(("bytes",), {"BN": (1, 64), "BD": (16, 1024)}),
}


def targets(setting: Setting):
    """Yields (kernel, key, default config, maker of a call) for every row of the tables of default configs."""
    size = setting.dtype.itemsize
    configs, _ = triton.configs_of(setting.device, size)
    for kernel, with_product in (("product", True), ("delta", False)):
        default = triton.forward_options(configs.forward, False, with_product=with_product)
        yield kernel, (size,), default, partial(_embedding_forward, with_product=with_product)
    yield "backward", (size,), triton.backward_options(configs.backward, False), _embedding_backward


def _embedding_forward(setting, with_product):
    random, sizes = RandomInputs.of(setting), setting.sizes
    ids = random.integers(0, sizes.vocabulary, sizes.batch, sizes.tokens)
    table = random.normal(sizes.vocabulary, sizes.width)
    shapes = (sizes.prompt, sizes.width), (sizes.tokens, sizes.rank), (sizes.rank, sizes.width)
    prompt, a, b = (random.normal(1, *shape, dtype=torch.float32) for shape in shapes)
    update = (a, b, None) if with_product else (None, None, a @ b)
    return lambda: (triton.forward(ids, table, prompt, *update, 1.0, 1.0, None, False, None),)


def _embedding_backward(setting):
    sizes = setting.sizes
    grad = RandomInputs.of(setting).normal(sizes.batch, sizes.prompt + sizes.tokens, sizes.width)
    return lambda: triton.backward(grad, 1, sizes.prompt, sizes.tokens, None, False, None, True, True)
