"""The cost of the accuracy of a method on frozen features by other means: full fine-tuning and DePT, each trained until
it reaches it.
"""

import time

import torch
from rich.table import Table
from sentences import DEPT, base_model, dept_model
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding


def fine_tuning(options):
    model = base_model(options.model)
    return model, [{"params": list(model.parameters()), "lr": 5e-5}]


METHODS = {
    "finetuning": ("full fine-tuning", fine_tuning),
    "dept": ("DePT", lambda options: dept_model(options.model, options.max_length, **DEPT)),
}


def add_arguments(parser) -> None:
    parser.add_argument(
        "--against", nargs="+", choices=list(METHODS), default=[], help="also train these to the same accuracy on dev"
    )
    parser.add_argument("--against-steps", type=int, default=500, help="steps after which they give up")
    parser.add_argument(
        "--against-every", type=int, default=20, help="steps from one look at dev to the next, which is not timed"
    )


def run(options, tokenizer, train: list[dict], dev: list[dict], target: float) -> dict[str, dict]:
    """Rows for ``cost_table``; ``train`` and ``dev`` as ``sentences.read`` returns them."""
    rows = {}
    for method in options.against:
        name, make = METHODS[method]
        model, groups = make(options)
        rows[name] = trained_to(target, model, groups, options, DataCollatorWithPadding(tokenizer), train, dev)
    return rows


def trained_to(target: float, model, groups, options, collate, train, dev) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    batches = endless(
        DataLoader(
            train, options.batch_size, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(0)
        )
    )
    seconds, steps, reached = 0.0, 0, 0.0
    while reached < target and steps < options.against_steps:
        start = time.perf_counter()
        for _ in range(min(options.against_every, options.against_steps - steps)):
            model(**next(batches).to(device)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        if device == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        reached = accuracy(model, DataLoader(dev, 64, collate_fn=collate), device)
    trained = sum(p.numel() for group in groups for p in group["params"])
    return {"trained_parameters": trained, "accuracy": reached, "training_seconds": seconds, "steps": steps}


def endless(loader):
    while True:
        yield from loader


@torch.no_grad()
def accuracy(model, batches, device: str) -> float:
    model.eval()
    right = sum(int((model(**batch.to(device)).logits.argmax(1) == batch["labels"]).sum()) for batch in batches)
    model.train()
    return right / len(batches.dataset)


def cost_table(rows: dict[str, dict], title: str) -> Table:
    result = Table("method", "trained numbers", "accuracy", "extraction, s", "training, s", "steps", title=title)
    for name, row in rows.items():
        extraction = f"{row['extraction_seconds']:.1f}" if "extraction_seconds" in row else "-"
        steps = str(row.get("steps", "-"))
        result.add_row(
            name,
            f"{row['trained_parameters']:,}",
            f"{row['accuracy']:.1%}",
            extraction,
            f"{row['training_seconds']:.3f}",
            steps,
        )
    return result
