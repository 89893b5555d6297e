"""DecT's two stages against the same work without kernels: extraction of features and scores, and training of the head.

    python benchmarks/dect.py --out results/dect.json

extract: RoBERTa-base's shape with random weights, 64 texts of 128 tokens, against the authors' procedure: padded to
512, all hidden states, logits of every token. fit: 30 epochs, 16 shots, H = 1024, against an ordinary PyTorch loop; the
roofline bound is the two matmuls of each epoch. Every candidate is checked before it is timed.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy, normalize
from transformers import RobertaConfig, RobertaForMaskedLM

from peft_kernels.dect.head import train
from peft_kernels.dect.mask_row import MaskRow
from peft_kernels.perf.measure import interleaved, peak_memory
from peft_kernels.perf.results import OURS, Row, compared, measured
from peft_kernels.perf.tables import table

SHOTS, EPOCHS, DIM, LR = 16, 30, 128, 0.01
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
OFFICIAL, PLAIN, PRODUCTS = "official", "plain PyTorch", "the products alone"


def extract(
    texts: int, tokens: int, padded: int, settings: dict, dtype: torch.dtype, device: str, repeats: int
) -> list[Row]:
    torch.manual_seed(0)
    model = (
        RobertaForMaskedLM(RobertaConfig(max_position_embeddings=padded + 2, type_vocab_size=1, **settings))
        .eval()
        .to(device, dtype)
    )
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

    candidates = {OURS: ours, OFFICIAL: official}
    error = max(
        float((got - expected).float().norm() / expected.float().norm()) for got, expected in zip(ours(), official())
    )
    if not error <= TOLERANCE[dtype]:
        raise SystemExit(f"{OURS} and {OFFICIAL} differ: {error:.1e}")
    shape, dtype_name = {"B": texts, "S": tokens, "H": model.config.hidden_size}, str(dtype).removeprefix("torch.")
    common = {
        "benchmark": "dect",
        "shape": shape,
        "dtype": dtype_name,
        "phase": "extract",
        "items": texts,
        "item": "texts",
    }
    timings = interleaved(candidates, repeats, warmup=0, device=device)
    memory = {
        candidate: {"peak_bytes": peak_memory(call, device)[1]} for candidate, call in candidates.items()
    }  # after the timing: a first call also loads library code
    return compared(timings, memory, error=error, **common)


def plain_fit(features, labels, scores, prototypes, weight, radius):
    """Train with the formula, autograd and torch.optim.Adam."""
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


def fit(width: int, classes: int, device: str, repeats: int) -> list[Row]:
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

    def matmuls():
        for _ in range(EPOCHS):
            torch.mm(features, start.projection.T, out=projected)
            torch.mm(grad.T, features, out=update)

    torch.testing.assert_close(ours(), plain(), rtol=1e-3, atol=1e-4)
    timings = interleaved({OURS: ours, PLAIN: plain, PRODUCTS: matmuls}, repeats, device=device)
    common = {
        "benchmark": "dect",
        "shape": {"N": len(labels), "C": classes, "H": width},
        "dtype": "float32",
        "phase": "fit",
    }
    return compared(timings, roofline_s=timings[PRODUCTS].median, **common)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="of the model that is asked"
    )
    parser.add_argument("--repeats", type=int, default=25, help="timed runs of each candidate; of extraction a fifth")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two runs: does it work at all")
    options = parser.parse_args()
    repeats = 2 if options.quick else options.repeats
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 500,
    }
    sizes = (4, 8, 32, small) if options.quick else (64, 128, 512, {"vocab_size": 50265})
    console, results = Console(), []
    cases_of = [
        lambda name=name: extract(*sizes, getattr(torch, name), options.device, max(2, repeats // 5))
        for name in options.dtype
    ]
    cases_of += [lambda n=n: fit(32 if options.quick else 1024, n, options.device, repeats) for n in (2, 14)]
    for measure in cases_of:
        rows = measure()
        results += rows
        console.print(table(rows))
    if options.out:
        measured(results, options.device).write(options.out)


if __name__ == "__main__":
    main()
