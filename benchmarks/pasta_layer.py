"""PASTA in a whole BERT: the cost that the vectors add to a forward and to a training step, against the published ways
to add them.

    python benchmarks/pasta_layer.py --model base large --dtype float32 bfloat16 --out results/pasta_layer.json

Random weights, 32 rows of 128 random tokens with [CLS] and [SEP], a classification head. A training step is forward and
backward with the dropout of the vectors, 0.1, and none in the model. The candidates:

- stock: without vectors; a training step trains the head alone
- official: the authors' order of operations: Python loops over the rows for the special tokens, then for each of them a
  product of the shape of all hidden states and an addition, in every layer. Their weights take gradients that are not
  used; "frozen" is without those.
- dense: one matmul of one-hot and vectors and one addition in every layer, weights frozen
- ours, and ours with the norms fused (pasta.fuse)

The operators are also timed alone: all calls of a forward, for all layers together, over the time of the stock forward.
"""

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from rich.console import Console
from transformers import BertConfig, BertForSequenceClassification

from peft_kernels import PASTAConfig, pasta
from peft_kernels.ops import special_token_add_, special_token_slots
from peft_kernels.perf.measure import interleaved
from peft_kernels.perf.pid_baselines import twin
from peft_kernels.perf.results import OURS, Row, compared, measured
from peft_kernels.perf.tables import table

SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
BATCH, LENGTH, CLS, SEP, VOCABULARY = 32, 128, 101, 102, 30_522
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
STOCK, OFFICIAL, OFFICIAL_FROZEN, DENSE, FUSED = "stock", "official", "official, frozen", "dense, frozen", "ours, fused"
OPERATORS = "operators alone"


def bert(size: str, dtype: torch.dtype, device: str):
    torch.manual_seed(0)
    config = BertConfig(**SIZES[size], vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).to(device, dtype)


def tokens(device: str):
    ids = torch.randint(1000, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = CLS, SEP
    return ids.to(device), torch.arange(BATCH, device=device) % 2


class Published(torch.nn.Module):
    """Vectors added by hooks on the layers of a stock model."""

    def __init__(self, model, vectors, official: bool, frozen: bool):
        super().__init__()
        self.model, self.official = model, official
        self.vectors = torch.nn.Parameter(vectors.clone())  # [L, P, d]
        self.dropout = torch.nn.Dropout(0.1)
        model.requires_grad_(not frozen)
        model.classifier.requires_grad_()
        for i, layer in enumerate(model.bert.encoder.layer):
            layer.register_forward_pre_hook(lambda _, args, i=i: (self.added(args[0], self.vectors[i]), *args[1:]))

    def forward(self, input_ids, labels=None):
        count = self.vectors.shape[1]
        masks = torch.zeros(count, *input_ids.shape, 1, device=input_ids.device, dtype=self.vectors.dtype)
        if self.official:
            for row, ids in enumerate(input_ids.tolist()):
                positions = [position for position, token in enumerate(ids) if token in (CLS, SEP)]
                for j, position in enumerate(positions):
                    masks[j, row, position] = 1
        else:
            special = (input_ids == CLS) | (input_ids == SEP)
            which = special.cumsum(1) - 1
            masks = torch.stack([special & (which == j) for j in range(count)])[..., None].to(self.vectors.dtype)
        self.masks = masks  # [P, B, S, 1]
        return self.model(input_ids=input_ids, labels=labels)

    def added(self, hidden, vectors):
        if not self.official:
            rows = self.dropout(vectors.expand(hidden.shape[0], -1, -1))  # [B, P, d]
            return hidden + self.masks[..., 0].permute(1, 2, 0) @ rows
        for mask, vector in zip(self.masks, vectors):
            hidden = hidden + mask * self.dropout(vector.expand_as(hidden))
        return hidden


def candidates(size: str, dtype: torch.dtype, device: str):
    stock = bert(size, dtype, device)
    config = PASTAConfig(task_type="SEQ_CLS", num_special_tokens=2, special_token_ids=[CLS, SEP])
    ours, fused = (get_peft_model(twin(stock), config) for _ in range(2))
    vectors = ours.base_model.model.pasta.pasta_vectors["default"].detach()
    fused.base_model.model.pasta.pasta_vectors["default"].data.copy_(vectors)
    pasta.fuse(fused)
    plain = twin(stock).requires_grad_(False)
    plain.classifier.requires_grad_()
    # models whose weights take gradients need their own weights
    published = {
        OFFICIAL: Published(bert(size, dtype, device), vectors.to(dtype), True, False),
        OFFICIAL_FROZEN: Published(bert(size, dtype, device), vectors.to(dtype), True, True),
        DENSE: Published(bert(size, dtype, device), vectors.to(dtype), False, True),
    }
    return {STOCK: plain, **published, OURS: ours, FUSED: fused}, vectors


def check(models, ids, labels, dtype):
    """Without dropout all models but the stock one agree."""
    for model in models.values():
        model.eval()
    with torch.no_grad():
        logits = {name: model(input_ids=ids).logits.float() for name, model in models.items()}
    for name in (OFFICIAL, OFFICIAL_FROZEN, DENSE, FUSED):
        error = float((logits[name] - logits[OURS]).norm() / logits[OURS].norm())
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"{name} and ours differ: {error:.1e}")
    if torch.equal(logits[STOCK], logits[OURS]):
        raise SystemExit("the vectors change nothing")


def forward_of(model, ids):
    def forward():
        with torch.no_grad():
            return model(input_ids=ids).logits

    return forward


def step_of(model, ids, labels):
    def step():
        model(input_ids=ids, labels=labels).loss.backward()
        for p in model.parameters():
            p.grad = None

    return step


def operators(vectors, ids):
    """The operators that a forward of the adapted model calls in addition to the stock model's."""
    hidden = torch.zeros(BATCH, LENGTH, vectors.shape[2], dtype=vectors.dtype, device=ids.device)
    special = torch.tensor([CLS, SEP], device=ids.device)

    def call():
        with torch.no_grad():
            slots = special_token_slots(ids, special, max_slots=2)
            for layer in vectors:
                special_token_add_(hidden, layer, slots)

    return call


def compare(size, dtype, device, repeats) -> list[list[Row]]:
    models, vectors = candidates(size, dtype, device)
    ids, labels = tokens(device)
    check(models, ids, labels, dtype)
    common = {
        "benchmark": "pasta_layer",
        "shape": {"B": BATCH, "S": LENGTH},
        "variant": f"BERT-{size}",
        "dtype": str(dtype).removeprefix("torch."),
    }
    common |= {"items": BATCH, "item": "samples"}
    # its forward equals official's
    forwards = {name: forward_of(model, ids) for name, model in models.items() if name != OFFICIAL_FROZEN}
    timings = interleaved(forwards, repeats, device=device)
    timings |= interleaved({OPERATORS: operators(vectors, ids)}, 5 * repeats, warmup=5, device=device)
    forward = compared(timings, {OPERATORS: {"items": None, "item": ""}}, phase="forward", **common)
    for model in models.values():
        model.train()
    timings = interleaved({name: step_of(model, ids, labels) for name, model in models.items()}, repeats, device=device)
    return [forward, compared(timings, phase="training step", **common)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", nargs="+", choices=("base", "large"), default=["base"])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two runs: does it work at all")
    options = parser.parse_args()
    console, results = Console(), []
    for size in ["tiny"] if options.quick else options.model:
        for name in options.dtype:
            for rows in compare(size, getattr(torch, name), options.device, 2 if options.quick else options.repeats):
                results += rows
                console.print(table(rows))
    if options.out:
        measured(results, options.device).write(options.out)


if __name__ == "__main__":
    main()
