"""Shared parts of the examples: labelled sentences, a Trainer on them, a table of the results."""

import json
from pathlib import Path

import torch
from peft import get_peft_model
from rich.table import Table
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from peft_kernels import DePTConfig, dept
from peft_kernels.perf.measure import environment, peak_memory

DEPT = {  # arguments of dept_model
    "virtual_tokens": 20,
    "rank": 60,
    "init_text": "is this sentence of a movie review positive or negative ?",
    "lr_prompt": 3e-3,
    "lr_low_rank": 3e-4,
    "lr_head": 5e-2,
}


def add_arguments(parser) -> None:
    parser.add_argument("--model", required=True, help="a folder or a hub id with a tokenizer")
    parser.add_argument(
        "--train", type=Path, required=True, help="a sentence, a tab and a label (0 or 1) in every line"
    )
    parser.add_argument("--dev", type=Path, required=True, help="the same")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a sentence; longer ones are cut")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="training sentences; all by default")


def read(path: Path, tokenizer, max_length: int, limit: int | None = None) -> list[dict]:
    rows = [
        line.rstrip("\n").rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ][:limit]
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    return [{"input_ids": ids, "labels": int(label)} for ids, (_, label) in zip(encoded["input_ids"], rows)]


def base_model(name: str):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)


def dept_model(name: str, max_length: int, *, virtual_tokens, rank, init_text, lr_prompt, lr_low_rank, lr_head):
    """The model and its parameter groups."""
    config = DePTConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=virtual_tokens,
        r=rank,
        max_length=max_length,
        init_text=init_text,
        tokenizer_name_or_path=name,
    )
    model = get_peft_model(base_model(name), config)
    return model, dept.param_groups(model, lr_prompt, lr_low_rank, lr_head=lr_head)


def trainer_of(model, groups, options, tokenizer, train, dev, epochs: float, pad_to: int | None = None) -> Trainer:
    """``groups``: parameter groups, each with its learning rate; None: the model is only evaluated."""
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        lr_scheduler_type="linear",
        warmup_steps=100,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    optimizer = (
        {}
        if groups is None
        else {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups, "weight_decay": 0.0})}
    )
    padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {}
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=dev,
        data_collator=DataCollatorWithPadding(tokenizer, **padding),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        **optimizer,
    )


def train_and_evaluate(model, groups, *arguments) -> dict:
    """Train, evaluate and measure; ``arguments``: those of ``trainer_of`` from ``options`` on."""
    trainer = trainer_of(model, groups, *arguments)
    _, peak, seconds = peak_memory(trainer.train, "cuda" if torch.cuda.is_available() else "cpu")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    accuracy = trainer.evaluate()["eval_accuracy"]
    return {
        "accuracy": accuracy,
        "seconds_per_epoch": seconds / trainer.args.num_train_epochs,
        "peak_bytes": peak,
        "trained_parameters": trained,
    }


def table(results: dict[str, dict]) -> Table:
    result = Table("method", "accuracy", "s / epoch", "peak MB", "trained parameters")
    for name, row in results.items():
        peak = "-" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        seconds = "-" if "seconds_per_epoch" not in row else f"{row['seconds_per_epoch']:.1f}"
        result.add_row(name, f"{row['accuracy']:.1%}", seconds, peak, f"{row['trained_parameters']:,}")
    return result


def write(options, results: dict[str, dict]) -> None:
    content = {
        "environment": environment(),
        "options": {k: str(v) for k, v in vars(options).items()},
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
