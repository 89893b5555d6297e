"""Shared cross-attention against every published way to compute it: time, share of the floor, ratio to the best.

    python benchmarks/pid_attention.py --device cpu --dtype float32 bfloat16 --out benchmarks/results/cpu/pid_attention.json

Every way is checked against float64 before it is timed. Queries lie in memory as (N, t, H, D), as a model's projection leaves them; keys
and values as (b, H, n, D), as its cache does. "expanded" baselines get their keys and values repeated beforehand, as the library's cache
holds them, and leave their gradients repeated; varlen_attn gets its own layout beforehand. On CUDA every way runs as a CUDA graph.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from pid_attention_baselines import BASELINES
from rich import box
from rich.console import Console
from rich.table import Table

from peft_kernels.bench.measure import Ceilings, captured, ceilings, interleaved, write_json
from peft_kernels.ops import shared_cross_attention

HEADS, WIDTH = 12, 64
SHAPES = ((1, 30, 1, 512), (4, 30, 1, 512), (1, 8, 1, 2048), (4, 30, 16, 512), (8, 5, 64, 1024))
RAGGED_SHAPES = ((4, 30, 1, 512), (4, 30, 16, 512), (8, 5, 64, 1024))  # lengths 50-100%
QUICK_SHAPES, QUICK_RAGGED_SHAPES = ((2, 3, 1, 16),), ((2, 3, 2, 16),)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # norm of the error over norm of the truth
OURS = "ours"
SECONDS, MAX_REPEATS = 3, 201  # short ways are repeated more often than asked: their times scatter most


@dataclass
class Problem:
    """b inputs of n keys, M streams each of t queries."""

    shape: tuple[int, int, int, int]
    query: torch.Tensor  # (N, H, t, D), token-major
    key: torch.Tensor  # (b, H, n, D)
    value: torch.Tensor
    lengths: torch.Tensor | None  # (b,)
    grad: torch.Tensor  # of the output, as query

    @property
    def keys_used(self) -> int:
        inputs, _, _, n = self.shape
        return inputs * n if self.lengths is None else int(self.lengths.sum())

    def floor(self, limits: Ceilings, backward: bool) -> float:
        """Each input read once, each output written once; 2 matrix products forward, 4 more backward."""
        _, streams, tokens, _ = self.shape
        rows = self.query.nbytes
        keys = 2 * self.keys_used * HEADS * WIDTH * self.query.element_size()
        nbytes = 4 * rows + 2 * keys if backward else 2 * rows + keys
        return limits.floor(nbytes, (12 if backward else 4) * streams * tokens * self.keys_used * HEADS * WIDTH)


def problem(shape, ragged: bool, dtype: torch.dtype, device: str) -> Problem:
    inputs, streams, tokens, n = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    query, grad = (normal(inputs * streams, tokens, HEADS, WIDTH).transpose(1, 2) for _ in range(2))
    lengths = torch.randint(n // 2, n + 1, (inputs,), generator=generator).to(device) if ragged else None
    return Problem(shape, query, normal(inputs, HEADS, n, WIDTH), normal(inputs, HEADS, n, WIDTH), lengths, grad)


def ours(p: Problem, backward: bool):
    def attend(query, key, value):
        return shared_cross_attention(query, key, value, key_lengths=p.lengths)

    return attend, (p.query, p.key, p.value), None


def prepared(prepare, p: Problem, backward: bool):
    """A function of nothing, and how its results become (out, dQ, dK, dV) in the operator's shapes."""
    attend, tensors, restore = prepare(p, backward)
    if not backward:

        def forward():
            with torch.no_grad():
                return (attend(*tensors),)

        return forward, restore
    leaves = [x.detach().requires_grad_() for x in tensors]

    def forward_backward():
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, p.grad)

    return forward_backward, restore


def truth(p: Problem, backward: bool):
    query, key, value = (x.double().requires_grad_(backward) for x in (p.query, p.key, p.value))
    out = shared_cross_attention(query, key, value, key_lengths=p.lengths, impl="reference")
    return (out, *torch.autograd.grad(out, (query, key, value), p.grad.double())) if backward else (out,)


def worst_error(results, expected) -> float:
    return max(float((x.detach().double() - y).norm() / y.norm()) for x, y in zip(results, expected))


def compare(p: Problem, backward: bool, repeats: int, seconds: float, limits: Ceilings, device: str) -> dict:
    """Check, then time all ways that can run here, ``repeats`` times and for ``seconds``."""
    expected = [x.detach() for x in truth(p, backward)]
    functions, errors, reasons = {}, {}, {}
    for name, prepare in {OURS: ours, **BASELINES}.items():
        try:
            function, restore = prepared(prepare, p, backward)
            results = function()
            errors[name] = worst_error(restore(results) if restore else results, expected)
            del results
            if not errors[name] <= TOLERANCE[p.query.dtype]:
                raise ValueError(f"wrong: error {errors[name]:.1e}")
            functions[name] = captured(function) if device == "cuda" else function
        except Exception as error:
            if name == OURS:
                raise
            reasons[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    del expected
    turn = sum(timing.median for timing in interleaved(functions, 1, warmup=3, device=device).values())
    timings = interleaved(functions, max(repeats, min(MAX_REPEATS, int(seconds / turn))), warmup=0, device=device)
    floor = p.floor(limits, backward)
    best = min((n for n in timings if n != OURS), key=lambda n: timings[n].median)
    return {
        "shape": p.shape,
        "lengths": None if p.lengths is None else p.lengths.tolist(),
        "dtype": str(p.query.dtype).removeprefix("torch."),
        "backward": backward,
        "floor_s": floor,
        "best_alternative": best,
        "ours_over_best": timings[OURS].median / timings[best].median,
        "ways": {n: {**t.to_json(), "share_of_floor": floor / t.median, "error": errors[n]} for n, t in timings.items()},
        "cannot_run": reasons,
    }


def table(row: dict) -> Table:
    what = f"{row['dtype']}, {'forward + backward' if row['backward'] else 'forward'}, (b, M, t, n) = {tuple(row['shape'])}"
    title = f"{what}{', ragged' if row['lengths'] else ''}: {row['ours_over_best']:.2f} of the time of {row['best_alternative']}"
    result = Table("way", title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for column in ("ms", "spread", "of floor", "x ours"):
        result.add_column(column, justify="right")
    for name, way in row["ways"].items():
        ratio = way["median_s"] / row["ways"][OURS]["median_s"]
        result.add_row(name, f"{way['median_s'] * 1e3:.3f}", f"{way['spread']:.0%}", f"{way['share_of_floor']:.0%}", f"{ratio:.2f}")
    result.caption = "\n".join(f"{name} not run: {reason}" for name, reason in row["cannot_run"].items())
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each way, or more where they are short")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two runs: does it work at all")
    options = parser.parse_args()
    plain, ragged = (QUICK_SHAPES, QUICK_RAGGED_SHAPES) if options.quick else (SHAPES, RAGGED_SHAPES)
    cases = [(shape, False) for shape in plain] + [(shape, True) for shape in ragged]
    repeats, seconds = (2, 0) if options.quick else (options.repeats, SECONDS)
    console, results, machine = Console(), [], {}
    for dtype in (getattr(torch, name) for name in options.dtype):
        limits = ceilings(dtype, options.device, quick=options.quick)
        machine[str(dtype).removeprefix("torch.")] = vars(limits)
        console.print(f"{dtype}: {limits}")
        for backward in (False, True):
            for shape, is_ragged in cases:
                p = problem(shape, is_ragged, dtype, options.device)
                results.append(compare(p, backward, repeats, seconds, limits, options.device))
                console.print(table(results[-1]))
    if options.out:
        write_json(options.out, device=options.device, repeats=repeats, ceilings=machine, results=results)


if __name__ == "__main__":
    main()
