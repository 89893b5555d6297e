"""The embedding of DePT against every published way to compute it: time, share of the floor, ratio to the official formulation.

    python benchmarks/dept_embedding.py --device cpu --dtype float32 bfloat16 --out benchmarks/results/cpu/dept_embedding.json

Every way is checked against float64 before it is timed. Parameters are float32, tokens random; 16 adapters: every row of the batch has
its own, in turn. The floor of a CPU is a clone of the output, whose fresh memory costs page faults; that of a GPU is what has to be
read and written at the copy bandwidth of the same run. On CUDA every way runs as a CUDA graph.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from peft_kernels.bench.measure import captured, copy_bandwidth, interleaved, write_json
from peft_kernels.ops import decomposed_prompt_embedding

SHAPES = ((16, 256, 60, 30, 768), (32, 256, 40, 45, 1024), (8, 1024, 60, 30, 4096))  # B, L, m, r, d
QUICK_SHAPES = ((4, 8, 3, 2, 32),)
ADAPTERS = (1, 16)
VOCABULARY = 32_128
SCALE = 1.5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # norm of the error over norm of the truth
OURS, OFFICIAL, FLOOR = "ours", "official", "clone of the output"
SECONDS, MAX_REPEATS = 6, 101


@dataclass
class Problem:
    ids: torch.Tensor  # (B, L)
    weight: torch.Tensor  # (V, d)
    prompt: torch.Tensor  # (K, m, d)
    a: torch.Tensor  # (K, L, r)
    b: torch.Tensor  # (K, r, d)
    adapter_ids: torch.Tensor | None  # (B,)
    grad: torch.Tensor  # (B, m + L, d)

    @property
    def trained(self):
        return self.prompt, self.a, self.b

    def bytes(self, backward: bool) -> int:
        """Every token's row of the table, the parameters and the output once; then the gradient and those of the parameters once."""
        parameters = sum(x.nbytes for x in self.trained)
        forward = self.ids.numel() * self.weight.shape[1] * self.weight.element_size() + parameters + self.grad.nbytes
        return forward + (self.grad.nbytes + parameters if backward else 0)


def problem(shape, adapters: int, dtype: torch.dtype, device: str, vocabulary: int) -> Problem:
    batch, length, virtual, rank, width = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size, dtype=torch.float32):
        return torch.randn(size, generator=generator).to(device, dtype)

    adapter_ids = torch.arange(batch, device=device) % adapters if adapters > 1 else None
    return Problem(
        torch.randint(0, vocabulary, (batch, length), generator=generator).to(device),
        normal(vocabulary, width, dtype=dtype),
        normal(adapters, virtual, width),
        normal(adapters, length, rank),
        normal(adapters, rank, width),
        adapter_ids,
        normal(batch, virtual + length, width, dtype=dtype),
    )


def ours(p: Problem, prompt, a, b):
    return decomposed_prompt_embedding(p.ids, p.weight, prompt, a, b, scale=SCALE, adapter_ids=p.adapter_ids)


def official(p: Problem, prompt, a, b):
    if p.adapter_ids is None:
        return official_formulation(p.ids, p.weight, prompt[0], a[0], b[0], scale=SCALE)
    prompts, update = prompt[p.adapter_ids], a[p.adapter_ids] @ b[p.adapter_ids]
    embedded = torch.nn.functional.embedding(p.ids, p.weight) + (update * SCALE).to(p.weight.dtype)
    return torch.cat((prompts.to(p.weight.dtype), embedded), dim=1)


def official_formulation(ids, weight, prompt, a, b, *, scale, embed_scale=1.0, insert_after_first=False, offsets=None, adapter_ids=None):
    """The authors' order of work: multiply, repeat prompt and update for every row, scale, add, concatenate."""
    batch, length = ids.shape
    prompts = prompt.repeat(batch, 1, 1).to(weight.dtype)
    update = (a @ b).repeat(batch, 1, 1)[:, :length] * scale
    tokens = embed_scale * torch.nn.functional.embedding(ids, weight) + update.to(weight.dtype)
    first = int(insert_after_first)
    return torch.cat((tokens[:, :first], prompts, tokens[:, first:]), dim=1)


def expanded(p: Problem, prompt, a, b):
    """The same as one would write it today: views in place of copies."""
    batch = p.ids.shape[0]
    if p.adapter_ids is None:
        prompts, update = prompt.expand(batch, -1, -1), SCALE * (a @ b)
    else:
        prompts, update = prompt[p.adapter_ids], (SCALE * (a @ b))[p.adapter_ids]
    embedded = torch.nn.functional.embedding(p.ids, p.weight) + update.to(p.weight.dtype)
    return torch.cat((prompts.to(p.weight.dtype), embedded), dim=1)


def ways():
    compiled = torch.compile(expanded, fullgraph=True)
    return {OURS: ours, OFFICIAL: official, "expanded": expanded, "expanded, compiled": compiled}


def prepared(embed, p: Problem, backward: bool):
    if not backward:

        def forward():
            with torch.no_grad():
                return (embed(p, *p.trained),)

        return forward
    leaves = [x.detach().requires_grad_() for x in p.trained]

    def forward_backward():
        out = embed(p, *leaves)
        return out, *torch.autograd.grad(out, leaves, p.grad)

    return forward_backward


def truth(p: Problem, backward: bool):
    leaves = [x.double().requires_grad_(backward) for x in p.trained]
    table = torch.nn.functional.embedding(p.ids, p.weight).double().flatten(0, 1)
    rows = torch.arange(len(table), device=table.device).view(p.ids.shape)
    out = decomposed_prompt_embedding(rows, table, *leaves, scale=SCALE, adapter_ids=p.adapter_ids, impl="reference")
    return [x.detach() for x in ((out, *torch.autograd.grad(out, leaves, p.grad.double())) if backward else (out,))]


def compare(shape, adapters, dtype, device, backward, repeats, seconds, vocabulary) -> dict:
    torch.compiler.reset()
    p = problem(shape, adapters, dtype, device, vocabulary)
    expected = truth(p, backward)
    functions, errors, reasons = {}, {}, {}
    for name, embed in ways().items():
        try:
            function = prepared(embed, p, backward)
            errors[name] = max(float((x.detach().double() - y).norm() / y.norm()) for x, y in zip(function(), expected))
            if not errors[name] <= TOLERANCE[dtype]:
                raise ValueError(f"wrong: error {errors[name]:.1e}")
            functions[name] = captured(function) if device == "cuda" else function
        except Exception as error:  # torch.compile wants a compiler
            if name == OURS:
                raise
            reasons[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    del expected
    if device == "cpu":
        out = functions[OURS]()[0].detach()
        functions[FLOOR] = out.clone
    turn = sum(timing.median for timing in interleaved(functions, 1, warmup=2, device=device).values())
    timings = interleaved(functions, max(repeats, min(MAX_REPEATS, int(seconds / turn))), warmup=0, device=device)
    floor = timings.pop(FLOOR).median if device == "cpu" else p.bytes(backward) / copy_bandwidth(device)
    return {
        "shape": shape,
        "adapters": adapters,
        "dtype": str(dtype).removeprefix("torch."),
        "backward": backward,
        "floor_s": floor,
        "over_official": timings[OFFICIAL].median / timings[OURS].median,
        "ways": {n: {**t.to_json(), "share_of_floor": floor / t.median, "error": errors[n]} for n, t in timings.items()},
        "cannot_run": reasons,
    }


def table(row: dict) -> Table:
    what = f"{row['dtype']}, {'forward + backward' if row['backward'] else 'forward'}, (B, L, m, r, d) = {tuple(row['shape'])}"
    adapters = f", {row['adapters']} adapters" if row["adapters"] > 1 else ""
    result = Table(
        "way",
        title=f"{what}{adapters}: {row['over_official']:.1f}x the official formulation",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
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
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each way, or more where they are short")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two runs: does it work at all")
    options = parser.parse_args()
    repeats, seconds = (2, 0) if options.quick else (options.repeats, SECONDS)
    vocabulary = 100 if options.quick else VOCABULARY
    console, results = Console(), []
    for dtype in (getattr(torch, name) for name in options.dtype):
        for backward in (False, True):
            for shape in QUICK_SHAPES if options.quick else SHAPES:
                for adapters in ADAPTERS:
                    results.append(compare(shape, adapters, dtype, options.device, backward, repeats, seconds, vocabulary))
                    console.print(table(results[-1]))
    if options.out:
        write_json(options.out, device=options.device, repeats=repeats, results=results)


if __name__ == "__main__":
    main()
