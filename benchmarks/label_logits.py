"""DecT's three steps against how they are done without kernels: label words' logits, extraction, training of the head.

    python benchmarks/label_logits.py --out benchmarks/results/cpu/label_logits.json

logits: label_logits on the mask's row, against the full logits of that row and gathered columns in PyTorch, 20 calls in a row.
extract: RoBERTa-base's shape with random weights, 64 texts of 128 tokens, against the authors' way: padded to 512, all hidden states,
logits of every token. fit: 30 epochs, against an ordinary PyTorch loop and the two matrix products of each epoch. Every way is checked
before it is timed.
"""

import argparse
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy, normalize
from transformers import RobertaConfig, RobertaForMaskedLM

from peft_kernels.bench.measure import Timing, interleaved, peak_memory, write_json
from peft_kernels.dect.head import train
from peft_kernels.dect.mask_row import MaskRow
from peft_kernels.ops import label_logits

OURS = "ours"
SHOTS, EPOCHS, DIM, LR = 16, 30, 128, 0.01
CALLS = 20  # a single one would mostly wait for its own code, which the full logits have driven from the caches


def logits(batch: int, vocabulary: int, width: int, words: int, device: str, repeats: int) -> dict:
    hidden, weight = torch.randn(batch, 32, width, device=device), torch.randn(vocabulary, width, device=device)
    bias, positions = torch.randn(vocabulary, device=device), torch.randint(32, (batch,), device=device)
    ids = torch.randperm(vocabulary, device=device)[:words, None]
    texts, flat = torch.arange(batch, device=device), ids.flatten()
    ways = {
        OURS: lambda: label_logits(hidden, weight, ids, bias=bias, positions=positions),
        "full logits of the row": lambda: (hidden[texts, positions] @ weight.T + bias)[:, flat],
        "gathered columns": lambda: hidden[texts, positions] @ weight[flat].T + bias[flat],
    }
    expected = (hidden[texts, positions].double() @ weight[flat].double().T + bias[flat]).float()
    for way in ways.values():
        torch.testing.assert_close(way(), expected, rtol=1e-4, atol=1e-3)
    return timed(f"logits of {words} words, B={batch}, V={vocabulary}, H={width}", ways, repeats, device, calls=CALLS)


def extract(texts: int, tokens: int, padded: int, settings: dict, device: str, repeats: int) -> dict:
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig(max_position_embeddings=padded + 2, type_vocab_size=1, **settings)).eval().to(device)
    ids = torch.randint(4, model.config.vocab_size, (texts, tokens), device=device)
    positions, words = torch.full((texts,), tokens - 3, device=device), [[17], [18]]
    row = MaskRow(model, words)

    def ours():
        return row(ids, torch.ones_like(ids), positions)

    @torch.no_grad()
    def official():
        filled = torch.cat((ids, ids.new_full((texts, padded - tokens), model.config.pad_token_id)), 1)
        mask = (torch.arange(padded, device=device) < tokens).long().expand(texts, -1)
        output = model(input_ids=filled, attention_mask=mask, output_hidden_states=True)
        at = torch.arange(texts, device=device)
        return output.hidden_states[-1][at, positions], output.logits[at, positions][:, [17, 18]]

    ways = {OURS: ours, "official": official}
    for got, expected in zip(ours(), official()):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    row_of = timed(f"extract {texts} texts of {tokens} tokens", ways, repeats, device, warmup=0)
    for name, way in ways.items():  # last: a first call also brings in the library's code
        row_of["ways"][name]["peak_bytes"] = peak_memory(way, device)[1]
    return row_of


def plain_fit(features, labels, scores, prototypes, weight, radius):
    """The formula, autograd and torch.optim.Adam."""
    projection = torch.nn.Linear(features.shape[1], DIM, bias=False, device=features.device)
    with torch.no_grad():
        projection.weight.copy_(weight)
    radius = radius.clone().requires_grad_()
    optimizer = torch.optim.Adam([projection.weight, radius], lr=LR)
    for _ in range(EPOCHS):
        q = radius - (normalize(projection(features), dim=1)[:, None] - prototypes).norm(dim=2) + scores / SHOTS
        loss = cross_entropy(q, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def fit(width: int, classes: int, device: str, repeats: int) -> dict:
    torch.manual_seed(0)
    labels = torch.arange(classes, device=device).repeat(SHOTS)
    features, scores = torch.randn(len(labels), width, device=device), torch.randn(len(labels), classes, device=device)
    options = {"dim": DIM, "lr": LR, "score_weight": 1 / SHOTS, "seed": 0}
    start, _ = train(features, labels, scores, classes, epochs=0, **options)
    grad, projected = torch.randn(len(labels), DIM, device=device), torch.empty(len(labels), DIM, device=device)
    update = torch.empty_like(start.projection)

    def ours():
        return train(features, labels, scores, classes, epochs=EPOCHS, **options)[1][-1]

    def plain():
        return plain_fit(features, labels, scores, start.prototypes, start.projection, start.radius)

    def products():
        for _ in range(EPOCHS):
            torch.mm(features, start.projection.T, out=projected)
            torch.mm(grad.T, features, out=update)

    torch.testing.assert_close(ours(), plain(), rtol=1e-3, atol=1e-4)
    return timed(
        f"fit {SHOTS} shots of {classes} classes, H={width}", {OURS: ours, "PyTorch": plain, "the products alone": products}, repeats, device
    )


def timed(what: str, ways: dict, repeats: int, device: str, warmup: int = 1, calls: int = 1) -> dict:
    timings = interleaved({name: in_a_row(way, calls) for name, way in ways.items()}, repeats, warmup=warmup, device=device)
    of_one_call = {name: Timing(tuple(seconds / calls for seconds in timing.seconds)) for name, timing in timings.items()}
    return {"what": what, "calls": calls, "ways": {name: timing.to_json() for name, timing in of_one_call.items()}}


def in_a_row(way, calls: int):
    def run():
        for _ in range(calls):
            way()

    return run


def table(row: dict) -> Table:
    result = Table("way", title=row["what"], title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("ms", "spread", "x ours", "peak MB"):
        result.add_column(column, justify="right")
    for name, way in row["ways"].items():
        ratio, peak = way["median_s"] / row["ways"][OURS]["median_s"], way.get("peak_bytes")
        spread = "-" if way["spread"] is None else f"{way['spread']:.0%}"
        result.add_row(name, f"{way['median_s'] * 1e3:.3f}", spread, f"{ratio:.2f}", "-" if peak is None else f"{peak / 1e6:,.0f}")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=25, help="timed runs of each way; of extraction a fifth")
    parser.add_argument("--steps", nargs="+", choices=("logits", "extract", "fit"), default=["logits", "extract", "fit"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two runs: does it work at all")
    options = parser.parse_args()
    device, repeats = options.device, 2 if options.quick else options.repeats
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 500}
    base = {"vocab_size": 50265}
    runs = {
        "logits": [lambda n=n: logits(*((4, 500, 32, n) if options.quick else (64, 50265, 768, n)), device, repeats) for n in (2, 14)],
        "extract": [lambda: extract(*((4, 8, 32, small) if options.quick else (64, 128, 512, base)), device, max(1, repeats // 5))],
        "fit": [lambda n=n: fit(32 if options.quick else 1024, n, device, repeats) for n in (2, 14)],
    }
    console, results = Console(), []
    for step in options.steps:
        for run in runs[step]:
            results.append(run())
            console.print(table(results[-1]))
    if options.out:
        write_json(options.out, device=device, repeats=repeats, results=results)


if __name__ == "__main__":
    main()
