"""The add, norm and injection between two post-norm layers in one pass, against the same as separate operations: time and share of the floor.

    python benchmarks/pasta_norm.py --device cpu --dtype float32 bfloat16 --out benchmarks/results/cpu/pasta_norm.json

Every way is checked against float64 before it is timed. weight and bias are frozen, x, residual and vectors take gradients. The floor is
what has to be read and written, once each, at the copy bandwidth of the same run. On CUDA every way runs as a CUDA graph.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.functional import layer_norm

from peft_kernels.bench.measure import captured, copy_bandwidth, interleaved, write_json
from peft_kernels.ops import add_layer_norm_inject

SHAPES = ((32, 128, 768), (32, 128, 1024))  # B, S, d
QUICK_SHAPES = ((2, 8, 32),)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # norm of the error over norm of the truth
OURS, SEPARATE = "ours", "add, layer_norm, dense add"
SECONDS, MAX_REPEATS = 6, 201
EPS = 1e-12


@dataclass
class Problem:
    x: torch.Tensor  # (B, S, d)
    residual: torch.Tensor  # (B, S, d)
    weight: torch.Tensor  # (d,)
    bias: torch.Tensor  # (d,)
    vectors: torch.Tensor  # (2, d)
    slots: torch.Tensor  # (B, 2)
    one_hot: torch.Tensor  # (B, S, 2)
    grad: torch.Tensor  # (B, S, d)

    @property
    def trained(self):
        return self.x, self.residual, self.vectors

    def bytes(self, backward: bool) -> int:
        """Forward: two reads and a write, and with backward another write, of the sum; backward: two reads and a write."""
        return (7 if backward else 3) * self.x.nbytes


def problem(shape, dtype: torch.dtype, device: str) -> Problem:
    batch, length, width = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    slots = torch.zeros(batch, 2, dtype=torch.int64)
    slots[:, 1] = torch.randint(1, length, (batch,), generator=generator)
    one_hot = torch.nn.functional.one_hot(slots, length).mT.to(device, dtype)
    x, residual, grad = (normal(*shape) for _ in range(3))
    return Problem(x, residual, 1 + normal(width) / 8, normal(width), normal(2, width), slots.to(device), one_hot, grad)


def ours(p: Problem, x, residual, vectors):
    return add_layer_norm_inject(x, residual, p.weight, p.bias, vectors, p.slots, eps=EPS)


def separate(p: Problem, x, residual, vectors):
    return layer_norm(x + residual, p.weight.shape, p.weight, p.bias, EPS) + p.one_hot @ vectors


def ways():
    return {OURS: ours, SEPARATE: separate, "the same, compiled": torch.compile(separate, fullgraph=True)}


def prepared(way, p: Problem, backward: bool):
    if not backward:

        def forward():
            with torch.no_grad():
                return (way(p, *p.trained),)

        return forward
    leaves = [t.detach().requires_grad_() for t in p.trained]

    def forward_backward():
        out = way(p, *leaves)
        return out, *torch.autograd.grad(out, leaves, p.grad)

    return forward_backward


def truth(p: Problem, backward: bool):
    wide = Problem(*(t.double() if t.is_floating_point() else t for t in vars(p).values()))
    return [t.detach() for t in prepared(separate, wide, backward)()]


def compare(shape, dtype, device, backward, repeats, seconds) -> dict:
    torch.compiler.reset()
    p = problem(shape, dtype, device)
    expected = truth(p, backward)
    functions, errors, reasons = {}, {}, {}
    for name, way in ways().items():
        try:
            function = prepared(way, p, backward)
            errors[name] = max(float((x.detach().double() - y).norm() / y.norm()) for x, y in zip(function(), expected))
            if not errors[name] <= TOLERANCE[dtype]:
                raise ValueError(f"wrong: error {errors[name]:.1e}")
            functions[name] = captured(function) if device == "cuda" else function
        except Exception as error:  # torch.compile wants a compiler
            if name == OURS:
                raise
            reasons[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    turn = sum(timing.median for timing in interleaved(functions, 1, warmup=2, device=device).values())
    timings = interleaved(functions, max(repeats, min(MAX_REPEATS, int(seconds / turn))), warmup=0, device=device)
    floor = p.bytes(backward) / copy_bandwidth(device)
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "backward": backward,
        "floor_s": floor,
        "over_separate": timings[SEPARATE].median / timings[OURS].median,
        "ways": {n: {**t.to_json(), "share_of_floor": floor / t.median, "error": errors[n]} for n, t in timings.items()},
        "cannot_run": reasons,
    }


def table(row: dict) -> Table:
    what = f"{row['dtype']}, {'forward + backward' if row['backward'] else 'forward'}, (B, S, d) = {tuple(row['shape'])}"
    title = f"{what}: {row['over_separate']:.1f}x separate operations"
    result = Table("way", title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for column in ("ms", "spread", "of floor", "x ours"):
        result.add_column(column, justify="right")
    for name, way in row["ways"].items():
        ratio = way["median_s"] / row["ways"][OURS]["median_s"]
        result.add_row(name, f"{way['median_s'] * 1e3:.2f}", f"{way['spread']:.0%}", f"{way['share_of_floor']:.0%}", f"{ratio:.2f}")
    result.caption = "\n".join(f"{name} not run: {reason}" for name, reason in row["cannot_run"].items())
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each way, or more where they are short")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two runs: does it work at all")
    options = parser.parse_args()
    repeats, seconds = (2, 0) if options.quick else (options.repeats, SECONDS)
    console, results = Console(), []
    for dtype in (getattr(torch, name) for name in options.dtype):
        for backward in (False, True):
            for shape in QUICK_SHAPES if options.quick else SHAPES:
                results.append(compare(shape, dtype, options.device, backward, repeats, seconds))
                console.print(table(results[-1]))
    if options.out:
        write_json(options.out, device=options.device, repeats=repeats, results=results)


if __name__ == "__main__":
    main()
