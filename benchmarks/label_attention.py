"""Cross-attention of label slots over frozen features against keys and values with scaled_dot_product_attention: time of a training step.

    python benchmarks/label_attention.py --device cpu --dtype float32 bfloat16 --out benchmarks/results/cpu/label_attention.json

Every way is checked against float64 before it is timed. Slots and all weights take gradients, features do not. Padded rows have lengths
drawn from 1 to n. The floor is the absorbed form's operations at the rate of one large product in the same run.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear, scaled_dot_product_attention

from peft_kernels.bench.measure import captured, interleaved, write_json
from peft_kernels.ops import label_cross_attention
from peft_kernels.ops.label_cross_attention import implementations

SHAPES = ((32, 128, 1024, 16, 2), (32, 128, 1024, 16, 8), (32, 128, 384, 12, 2))  # B, n, d, heads, labels
QUICK_SHAPES = ((2, 8, 32, 2, 2),)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # norm of the error over norm of the truth
EXPLICIT, ABSORBED, OURS = "keys and values, sdpa", "absorbed, plain PyTorch", "ours"
SECONDS, MAX_REPEATS = 15, 101


@dataclass
class Problem:
    slots: torch.Tensor  # (C + 1, d)
    weights: tuple  # w_q, w_k, w_v, (d, d)
    features: torch.Tensor  # (B, n, d)
    lengths: torch.Tensor | None  # (B,)
    grad: torch.Tensor  # (B, C + 1, d)
    heads: int

    @property
    def trained(self):
        return self.slots, *self.weights

    @property
    def visible(self) -> torch.Tensor | None:
        """(B, 1, 1, n)"""
        if self.lengths is None:
            return None
        return (torch.arange(self.features.shape[1], device=self.lengths.device) < self.lengths[:, None])[:, None, None]

    def operations(self, backward: bool) -> int:
        batch, n, width = self.features.shape
        tokens = batch * n if self.lengths is None else int(self.lengths.sum())
        slots = len(self.slots)
        return (2 if backward else 1) * 4 * tokens * width * slots * self.heads + (3 if backward else 1) * 2 * batch * slots * width**2


def problem(shape, dtype, device, padded) -> Problem:
    batch, n, width, heads, labels = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    lengths = torch.randint(1, n + 1, (batch,), generator=generator).to(device) if padded else None
    weights = tuple((normal(width, width) / width**0.5).to(device, dtype) for _ in range(3))
    features, grad = normal(batch, n, width).to(device, dtype), normal(batch, labels + 1, width).to(device, dtype)
    return Problem(normal(labels + 1, width).to(device, dtype), weights, features, lengths, grad, heads)


def ours(impl):
    return lambda p, slots, *weights: label_cross_attention(slots, p.features, *weights, lengths=p.lengths, num_heads=p.heads, impl=impl)


def explicit(p: Problem, slots, w_q, w_k, w_v):
    q, k, v = (x.unflatten(-1, (p.heads, -1)).transpose(-2, -3) for x in (linear(slots, w_q), linear(p.features, w_k), linear(p.features, w_v)))
    out = scaled_dot_product_attention(q.expand(len(k), *q.shape), k, v, attn_mask=p.visible)
    return out.transpose(1, 2).flatten(2)


def absorbed(p: Problem, slots, w_q, w_k, w_v):
    width = slots.shape[1]
    queries = linear(slots, w_q).unflatten(1, (p.heads, -1)).transpose(0, 1)
    queries = torch.bmm(queries, w_k.view(p.heads, -1, width)).flatten(0, 1)  # (H * S, d)
    scores = queries @ p.features.mT * (width // p.heads) ** -0.5
    if p.lengths is not None:
        scores = scores.masked_fill(~p.visible[:, 0], -torch.inf)
    pooled = torch.bmm(scores.softmax(-1), p.features).unflatten(1, (p.heads, -1))
    return torch.einsum("bhsd,hed->bshe", pooled, w_v.view(p.heads, -1, width)).flatten(2)


def ways(device, dtype):
    names = [name for name in ("matmul", "cpp", "triton") if implementations.unavailable(name, device, dtype) is None]
    can = {f"ours, {name}": ours(name) for name in names if (device, name) != ("cpu", "triton")}
    return {OURS: ours("auto"), EXPLICIT: explicit, ABSORBED: absorbed, **can}


def prepared(way, p: Problem, backward: bool):
    if not backward:

        def forward():
            with torch.no_grad():
                return (way(p, *p.trained),)

        return forward
    leaves = [x.detach().requires_grad_() for x in p.trained]

    def forward_backward():
        out = way(p, *leaves)
        return out, *torch.autograd.grad(out, leaves, p.grad)

    return forward_backward


def truth(p: Problem, backward: bool):
    wide = replace(p, slots=p.slots.double(), weights=tuple(w.double() for w in p.weights), features=p.features.double(), grad=p.grad.double())
    return [x.detach() for x in prepared(explicit, wide, backward)()]


def product_rate(dtype, device) -> float:
    """Operations per second of one large product."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    return 2 * 2048**3 / interleaved({"product": lambda: a @ b}, 9, warmup=2, device=device)["product"].median


def compare(shape, dtype, device, padded, backward, repeats, seconds) -> dict:
    p = problem(shape, dtype, device, padded)
    expected, functions, errors = truth(p, backward), {}, {}
    for name, way in ways(device, dtype).items():
        function = prepared(way, p, backward)
        errors[name] = max(float((x.detach().double() - y).norm() / y.norm()) for x, y in zip(function(), expected))
        if not errors[name] <= TOLERANCE[dtype]:
            raise SystemExit(f"{name} is wrong: error {errors[name]:.1e}")
        functions[name] = captured(function) if device == "cuda" else function
    turn = sum(timing.median for timing in interleaved(functions, 1, warmup=2, device=device).values())
    timings = interleaved(functions, max(repeats, min(MAX_REPEATS, int(seconds / turn))), warmup=0, device=device)
    floor = p.operations(backward) / product_rate(dtype, device)
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "padded": padded,
        "backward": backward,
        "floor_s": floor,
        "over_explicit": timings[EXPLICIT].median / timings[OURS].median,
        "ways": {n: {**t.to_json(), "share_of_floor": floor / t.median, "error": errors[n]} for n, t in timings.items()},
    }


def table(row: dict) -> Table:
    what = f"{row['dtype']}, {'forward + backward' if row['backward'] else 'forward'}{', padded' if row['padded'] else ''}"
    title = f"{what}, (B, n, d, heads, labels) = {tuple(row['shape'])}: {row['over_explicit']:.1f}x keys and values"
    result = Table("way", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("ms", "spread", "of floor", "x ours"):
        result.add_column(column, justify="right")
    for name, way in row["ways"].items():
        ratio = way["median_s"] / row["ways"][OURS]["median_s"]
        result.add_row(name, f"{way['median_s'] * 1e3:.2f}", f"{way['spread']:.0%}", f"{way['share_of_floor']:.0%}", f"{ratio:.2f}")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each way, or more where they are short")
    parser.add_argument("--forward", action="store_true", help="the forward pass alone, too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two runs: does it work at all")
    options = parser.parse_args()
    repeats, seconds = (2, 0) if options.quick else (options.repeats, SECONDS)
    console, results = Console(), []
    for dtype in (getattr(torch, name) for name in options.dtype):
        for backward in (False, True) if options.forward else (True,):
            for shape in QUICK_SHAPES if options.quick else SHAPES:
                for padded in (False, True):
                    results.append(compare(shape, dtype, options.device, padded, backward, repeats, seconds))
                    console.print(table(results[-1]))
    if options.out:
        write_json(options.out, device=options.device, repeats=repeats, results=results)


if __name__ == "__main__":
    main()
