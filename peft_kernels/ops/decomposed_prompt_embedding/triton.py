"""Launchers and default configs of the Triton kernels.

No launch synchronizes with the device or depends on a value there.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tuned
from ..triton_runtime import cdiv, contiguous, dense, device_of, guard, kernel_module, unavailable

triton_kernels = kernel_module(__package__)

__all__ = ["backward", "forward", "unavailable"]

PROGRAMS_PER_PROCESSOR = 2  # minimum per SM before a program takes several rows of the batch
MAX_ROWS = 16


class Config(NamedTuple):
    """Rows (forward: positions, backward: rows of the batch), columns and ranks of ``a`` per block."""

    rows: int
    columns: int
    ranks: int = 0
    num_warps: int = 4
    precision: str = "ieee"
    registers: int | None = None  # limit per thread in kernels with a matmul: above it, an SM holds only one block


class Configs(NamedTuple):
    forward: Config
    backward: Config


# (vendor, bytes per element of the table); an architecture gets a row of its own only if measurements show that it
# needs one. `make test-kernels` compiles every row for every architecture, without a GPU. A 16-bit result does not need
# the last bits of the matmul: three TF32 matmuls on tensor cores have an error below 2^-20.
CONFIGS = {
    ("nvidia", 2): Configs(Config(32, 128, 16, 8, "tf32x3", 128), Config(8, 256)),
    ("nvidia", 4): Configs(Config(32, 128, 16, 8, "ieee", 128), Config(8, 128)),
    ("amd", 2): Configs(Config(32, 128, 16, 4), Config(8, 256)),
    ("amd", 4): Configs(Config(32, 128, 16, 4), Config(8, 128)),
}


def forward(
    input_ids, weight, prompt, a, b, delta, scale, embed_scale, offsets, insert_after_first, adapter_ids
) -> Tensor:
    batch, length = input_ids.shape
    virtual, width = prompt.shape[1:]
    out = weight.new_empty(batch, virtual + length, width)
    if not out.numel():
        return out
    weight = dense(weight)
    prompt, a, b, delta = contiguous(prompt, a, b, delta)
    positions, rank = a.shape[1:] if delta is None else (delta.shape[1], 0)
    configs, processors = configs_of(weight.device, weight.element_size())
    shipped = forward_options(configs.forward, insert_after_first, with_product=delta is None)
    kernel = "product" if delta is None else "delta"
    options = tuned.options("decomposed_prompt_embedding", kernel, weight.device, shipped, weight.element_size())
    programs_per_row = cdiv(width, options["BD"]) * (cdiv(virtual, options["BP"]) + cdiv(length, options["BP"]))
    rows = rows_per_program(batch, programs_per_row, processors)
    with guard(weight.device):
        triton_kernels.decomposed_prompt_embedding_fwd_kernel[programs_per_row * cdiv(batch, rows),](
            out, input_ids, weight, prompt, a, b, delta, offsets, adapter_ids,
            batch, length, virtual, positions, rank, width, rows, weight.shape[0], len(prompt), scale, embed_scale,
            *input_ids.stride(), weight.stride(0), _stride(offsets), _stride(adapter_ids),
            **options,
        )  # fmt: skip
    return out


def backward(
    grad, adapters, virtual, positions, offsets, insert_after_first, adapter_ids, need_prompt, need_delta
) -> tuple[Tensor | None, Tensor | None]:
    batch, columns, width = grad.shape
    grad_prompt, grad_delta = (
        grad.new_empty(adapters, rows, width, dtype=torch.float32) if needed else None
        for rows, needed in ((virtual, need_prompt), (positions, need_delta))
    )
    prompt_rows, delta_rows = (0 if x is None else x.shape[1] for x in (grad_prompt, grad_delta))
    if not adapters * (prompt_rows + delta_rows) * width:
        return grad_prompt, grad_delta
    grad = dense(grad)
    configs, _ = configs_of(grad.device, grad.element_size())
    shipped = backward_options(configs.backward, insert_after_first)
    options = tuned.options("decomposed_prompt_embedding", "backward", grad.device, shipped, grad.element_size())
    with guard(grad.device):
        programs = cdiv(width, options["BD"]) * adapters * (prompt_rows + delta_rows)
        triton_kernels.decomposed_prompt_embedding_bwd_kernel[programs,](
            grad, grad_prompt, grad_delta, offsets, adapter_ids,
            batch, columns - virtual, virtual, prompt_rows, delta_rows, width,
            *grad.stride()[:2], _stride(offsets), _stride(adapter_ids),
            **options,
        )  # fmt: skip
    return grad_prompt, grad_delta


def rows_per_program(batch: int, programs_per_row: int, processors: int) -> int:
    """Returns the rows of the batch per program: more rows share one computed update, but enough programs must remain
    to fill the device.
    """
    return max(1, min(batch * programs_per_row // (PROGRAMS_PER_PROCESSOR * processors), MAX_ROWS))


@cache
def forward_options(config: Config, insert_after_first: bool, with_product: bool) -> dict:
    blocks = {"BP": config.rows, "BD": config.columns, "BR": config.ranks, "PRECISION": config.precision}
    limit = {"maxnreg": config.registers} if with_product and config.registers else {}
    return {"FIRST": int(insert_after_first), **blocks, **_compiler_options(config), **limit}


@cache
def backward_options(config: Config, insert_after_first: bool) -> dict:
    return {"FIRST": int(insert_after_first), "BN": config.rows, "BD": config.columns, **_compiler_options(config)}


def _compiler_options(config: Config) -> dict:
    return {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def configs_of(device: torch.device, size: int) -> tuple[Configs, int]:
    """Returns the configs for elements of ``size`` bytes, and the number of SMs."""
    family, processors = device_of(device)
    return CONFIGS["amd" if family == "gfx942" else "nvidia", size], processors


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
