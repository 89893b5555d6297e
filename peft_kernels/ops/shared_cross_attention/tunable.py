"""The configs that `peft-kernels tune` searches, and the calls in which it times them."""

from functools import partial

from ..problem import RandomInputs, Setting
from ..tuned import Kernel
from . import triton

_ATTENTION = {"BM": (16, 128), "BN": (16, 128)}
KERNELS = {
    "forward": Kernel(("bytes", "head_dim", "rows"), _ATTENTION),
    "query_grad": Kernel(("bytes", "head_dim"), _ATTENTION),
    "key_value_grad": Kernel(("bytes", "head_dim"), _ATTENTION, tiles=2),
}


def targets(setting: Setting):
    """Yields (kernel, key, default config, maker of a call) for every row of the tables of default configs."""
    dtype, device, sizes = setting
    family, _ = triton.device_of(device)
    size = dtype.itemsize
    for head_dim in sizes.head_dims:
        configs = triton.configs_of(family, size, head_dim)
        key = size, triton.table_d(head_dim)

        def default(config, head_dim=head_dim):
            return triton.launch_options(config, family, size, head_dim)

        for config in configs.forward:
            # the last config also serves all larger row counts
            rows = config.rows * (4 if config is configs.forward[-1] else 1)
            yield (
                "forward",
                (*key, config.rows),
                default(config),
                partial(_attention_forward, head_dim=head_dim, rows=rows),
            )
        grad = partial(_attention_backward, head_dim=head_dim)
        yield "query_grad", key, default(configs.query_grad), partial(grad, needs=(True, False, False))
        yield "key_value_grad", key, default(configs.key_value_grad), partial(grad, needs=(False, True, True))


def _attention_inputs(setting, head_dim, rows):
    """Draws query, key, value and gradient with one token per stream, token-major as projections produce them."""
    random, sizes = RandomInputs.of(setting), setting.sizes
    heads = max(1, sizes.width // head_dim)
    query, grad = (random.normal(sizes.documents * rows, 1, heads, head_dim).transpose(1, 2) for _ in range(2))
    key, value = (random.normal(sizes.documents, sizes.tokens, heads, head_dim).transpose(1, 2) for _ in range(2))
    return (query, key, value), grad


def _attention_forward(setting, head_dim, rows):
    inputs, _ = _attention_inputs(setting, head_dim, rows)
    return lambda: triton.forward(*inputs, None, None, head_dim**-0.5)


def _attention_backward(setting, head_dim, needs):
    inputs, grad = _attention_inputs(setting, head_dim, setting.sizes.tokens)
    saved = triton.forward(*inputs, None, None, head_dim**-0.5)
    return lambda: triton.backward(grad, None, *inputs, *saved, None, None, head_dim**-0.5, *needs)
