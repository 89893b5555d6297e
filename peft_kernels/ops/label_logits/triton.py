"""Launchers and default configs of the Triton kernels.

No launch synchronizes with the device or depends on a value there.
"""

from functools import cache
from typing import NamedTuple

import torch

from .. import tuned
from ..triton_runtime import COMPILER_OPTIONS, cdiv, contiguous, guard, kernel_module, strides, unavailable

triton_kernels = kernel_module(__package__)

__all__ = ["backward", "forward", "unavailable"]


class Config(NamedTuple):
    """Words and columns per block."""

    words: int
    columns: int
    num_warps: int


# Forward takes the first config that holds all words, else the last. `make test-kernels` compiles every row for every
# architecture, without a GPU.
FORWARD = (Config(2, 1024, 4), Config(8, 256, 4))
BACKWARD = Config(4, 512, 4)


def forward(hidden, weight, label_ids, bias, positions):
    (batch, width), words = (hidden.shape[0], hidden.shape[-1]), label_ids.numel()
    out = hidden.new_empty(batch, *label_ids.shape, dtype=torch.float32)
    (label_ids,) = contiguous(label_ids)
    if out.numel():
        config = forward_config(words)
        options = tuned.options(
            "label_logits", "forward", weight.device, launch_options(config), weight.element_size(), config.words
        )
        with guard(hidden.device):
            triton_kernels.label_logits_fwd_kernel[cdiv(words, options["BW"]) * batch,](
                out, hidden, weight, label_ids, bias, positions,
                hidden.shape[1], words, weight.shape[0], width, hidden.stride(0), hidden.stride(-2), hidden.stride(-1),
                *weight.stride(), *strides(bias, 1), *strides(positions, 1),
                **options,
            )  # fmt: skip
    return out


def backward(grad_words, weight, label_ids):
    batch, width = grad_words.shape[0], weight.shape[1]
    grad_rows = grad_words.new_empty(batch, width)
    grad_words, label_ids = contiguous(grad_words, label_ids)
    if grad_rows.numel():
        options = tuned.options(
            "label_logits", "backward", weight.device, launch_options(BACKWARD), weight.element_size()
        )
        with guard(weight.device):
            triton_kernels.label_logits_bwd_kernel[cdiv(width, options["BD"]) * batch,](
                grad_rows, grad_words, weight, label_ids, label_ids.numel(), *weight.shape, *weight.stride(), **options
            )
    return grad_rows


def forward_config(words: int) -> Config:
    return next((c for c in FORWARD if c.words >= words), FORWARD[-1])


@cache
def launch_options(config: Config) -> dict:
    return {"BW": config.words, "BD": config.columns, "num_warps": config.num_warps, **COMPILER_OPTIONS}
