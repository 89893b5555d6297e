"""The configs that `peft-kernels tune` searches, and the calls in which it times them."""

import torch

from ..problem import RandomInputs, Setting
from ..tuned import Kernel
from . import triton

KERNELS = {
    "slots": Kernel((), {"BS": (128, 4096)}),
    "add": Kernel(("bytes",), {"BD": (64, 4096)}),
    "backward": Kernel(("bytes",), {"BN": (1, 64), "BD": (32, 1024)}),
}


def targets(setting: Setting):
    """Yields (kernel, key, default config, maker of a call) for every row of the tables of default configs."""
    size = setting.dtype.itemsize
    if setting.dtype == torch.float32:
        yield "slots", (), triton.slots_options(), _find_slots
    yield "add", (size,), triton.add_options(size), _add
    yield "backward", (size,), triton.backward_options(size, False), _vector_grad


def spread_slots(setting):
    """Returns slots, (B, k), spread evenly over the tokens."""
    sizes = setting.sizes
    row = torch.arange(sizes.specials, dtype=torch.int32, device=setting.device) * (sizes.tokens // sizes.specials)
    return row.repeat(sizes.batch, 1)


def random_vectors(random, setting, width):
    return random.normal(1, setting.sizes.specials, width, dtype=torch.float32)


def _find_slots(setting):
    sizes = setting.sizes
    ids = RandomInputs.of(setting).integers(0, sizes.vocabulary, sizes.batch, sizes.tokens)
    specials = torch.arange(sizes.specials, device=setting.device)
    return lambda: triton.slots(ids, specials, None, sizes.tokens)


def _add(setting):
    random, sizes = RandomInputs.of(setting), setting.sizes
    hidden = random.normal(sizes.batch, sizes.tokens, sizes.width)
    vectors, slots = random_vectors(random, setting, sizes.width), spread_slots(setting)

    def call():
        triton.add_(hidden, vectors, slots, 0.0, None, None)
        return (hidden,)

    return call


def _vector_grad(setting):
    sizes = setting.sizes
    grad, slots = RandomInputs.of(setting).normal(sizes.batch, sizes.tokens, sizes.width), spread_slots(setting)
    return lambda: (triton.backward(grad, slots, 1, sizes.specials, 0.0, None, None),)
