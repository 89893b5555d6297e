"""C++ for the CPU. Forward is one fused kernel, csrc/cpu/shared_cross_attention*; backward is float32 products, a few heads at a time."""

from pathlib import Path

import torch

from . import folding

LIBRARY = Path(__file__).parents[2] / "_native.so"
DTYPES = (torch.float32, torch.bfloat16)
SCORE_BYTES = 8 << 20  # of one block of heads in backward


def _load() -> str | None:
    """Why the library cannot be used, or None."""
    if not LIBRARY.exists():
        return "the native library is not built: install with a C++ compiler and `pip install --no-build-isolation`"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


_problem = _load()


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"its kernels run on the CPU, not on {device}"
    if dtype not in DTYPES:
        return f"its kernels take {' and '.join(str(x) for x in DTYPES)}, not {dtype}"
    return _problem


def forward(query, key, value, key_lengths, encoder_index, scale, need_lse):
    return torch.ops.peft_kernels.shared_cross_attention_cpu.default(query, key, value, key_lengths, encoder_index, scale)


def backward(grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs):
    return folding.backward(_attend_backward, grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs)


def _attend_backward(grad_out, grad_lse, query, key, value, out, lse, scale, needs):
    heads, rows, n = query.shape[0] * query.shape[1], query.shape[2], key.shape[2]
    delta = (grad_out.float() * out.float()).sum(-1)  # (g, H, M*t)
    if grad_lse is not None:
        delta -= grad_lse
    row = [x.flatten(0, 1)[..., None] for x in (lse, delta)]
    wide = [x.flatten(0, 1) for x in (grad_out, query, key, value)]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None for x, needed in zip(wide[1:], needs)]
    dq, dk, dv = grads
    step = max(1, min(heads, SCORE_BYTES // (4 * rows * n)))
    for block in (slice(h, h + step) for h in range(0, heads, step)):
        do, q, k, v = (x[block].float() for x in wide)
        p = torch.bmm(q, k.mT).mul_(scale).sub_(row[0][block]).exp_()  # [step, M*t, n]
        if dv is not None:
            dv[block] = torch.bmm(p.mT, do)
        if dq is not None or dk is not None:
            ds = torch.bmm(do, v.mT).sub_(row[1][block]).mul_(p).mul_(scale)
            if dq is not None:
                dq[block] = torch.bmm(ds, k)
            if dk is not None:
                dk[block] = torch.bmm(ds.mT, q)
    return tuple(None if x is None else x.unflatten(0, query.shape[:2]) for x in grads)
