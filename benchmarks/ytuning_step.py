"""A training step of Y-Tuning on cached features against a full fine-tuning step of the encoder that made them.

    python benchmarks/ytuning_step.py --device cpu --dtype float32 --out results/ytuning_step.json

BERT-base's architecture with random weights, 32 rows of 128 tokens, 2 labels. A step is forward, backward and AdamW.
Y-Tuning has one label block as wide as the encoder; its weights are float32, and --dtype applies to the encoder and the
cached features. Before anything is timed, its loss is compared with that of the same blocks with keys and values in
plain PyTorch, and has to decrease.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import BertConfig, BertForSequenceClassification

from peft_kernels.perf.measure import interleaved, peak_memory
from peft_kernels.perf.results import OURS, Row, compared, measured
from peft_kernels.perf.tables import table
from peft_kernels.ytuning import YTuningConfig, YTuningForSequenceClassification
from peft_kernels.ytuning import model as blocks

BATCH, LENGTH, LABELS = 32, 128, 2
LR, STEPS = 1e-5, 20  # steps in which the loss has to decrease
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 1000,
}
PLAIN, FULL = "keys and values, sdpa", "full fine-tuning"


def keys_and_values(slots, features, w_q, w_k, w_v, *, lengths, num_heads):
    """``label_cross_attention`` of full rows."""
    features = features.to(slots.dtype)
    products = linear(slots, w_q), linear(features, w_k), linear(features, w_v)
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(-2, -3) for x in products)
    return scaled_dot_product_attention(q.expand(len(k), *q.shape[-3:]), k, v).transpose(1, 2).flatten(2)


def step_of(model, attention=blocks.label_cross_attention, **inputs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def step():
        with patch.object(blocks, "label_cross_attention", attention):
            loss = model(**inputs).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def label_blocks(encoder, device: str):
    torch.manual_seed(0)
    config = encoder.config
    options = {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.hidden_size,
    }
    return (
        YTuningForSequenceClassification(YTuningConfig(**options, hidden_dropout_prob=0.0, num_labels=LABELS))
        .to(device)
        .train()
    )


def check(ours, plain):
    first, expected = ours(), plain()
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
    for _ in range(STEPS):
        last = ours()
    if not last < first:
        raise SystemExit(f"Y-Tuning's loss does not fall: {first:.4f} at first, {last:.4f} after {STEPS} steps")


def compare(settings: dict, dtype: torch.dtype, device: str, repeats: int) -> list[Row]:
    torch.manual_seed(0)
    encoder = BertForSequenceClassification(BertConfig(num_labels=LABELS, **settings)).to(device, dtype).train()
    ids = torch.randint(encoder.config.vocab_size, (BATCH, LENGTH), device=device)
    labels = torch.arange(BATCH, device=device) % LABELS
    with torch.no_grad():
        features = encoder.bert(ids).last_hidden_state
    steps = {
        OURS: step_of(label_blocks(encoder, device), features=features, labels=labels),
        PLAIN: step_of(label_blocks(encoder, device), keys_and_values, features=features, labels=labels),
        FULL: step_of(encoder, input_ids=ids, labels=labels),
    }
    check(steps[OURS], steps[PLAIN])
    steps[FULL]()
    memory = {candidate: {"peak_bytes": peak_memory(step, device)[1]} for candidate, step in steps.items()}
    timings = interleaved(steps, repeats, device=device)
    shape = {"B": BATCH, "S": LENGTH, "d": encoder.config.hidden_size}
    common = {
        "benchmark": "ytuning_step",
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "phase": "training step",
    }
    return compared(timings, memory, items=BATCH, item="samples", **common)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny encoder, two runs: does it work at all")
    options = parser.parse_args()
    console, results = Console(), []
    for name in options.dtype:
        rows = compare(
            TINY if options.quick else {}, getattr(torch, name), options.device, 2 if options.quick else options.repeats
        )
        results += rows
        console.print(table(rows))
    if options.out:
        measured(results, options.device).write(options.out)


if __name__ == "__main__":
    main()
