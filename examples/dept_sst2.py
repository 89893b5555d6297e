"""Train DePT on SST-2 with Trainer, save the adapter, load it again; beside it prompt tuning and DePT as its authors compute it.

    python examples/dept_sst2.py --model PATH_OR_ID --train train.tsv --dev dev.tsv

The files have a sentence, a tab and a label (0 or 1) in every line. The model is any BERT-like encoder or any other that has a
sequence classification class; its weights stay frozen.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from peft_kernels import DePTConfig, dept
from peft_kernels.bench.measure import environment, peak_memory
from peft_kernels.dept import layer

OURS, OFFICIAL, PROMPT_TUNING = "DePT, ours", "DePT, official formulation", "prompt tuning, 100 tokens"


def read(path: Path, tokenizer, max_length: int, limit: int | None) -> list[dict]:
    rows = [line.rstrip("\n").rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    return [{"input_ids": ids, "labels": int(label)} for ids, (_, label) in zip(encoded["input_ids"], rows)]


def official_formulation(input_ids, weight, prompt, a, b, *, scale, embed_scale, insert_after_first, offsets=None, adapter_ids=None):
    """What the authors' code does to embeddings: repeat, multiply, scale, add, concatenate."""
    batch, length = input_ids.shape
    update = (a @ b).repeat(batch, 1, 1)[:, :length] * scale
    tokens = embed_scale * torch.nn.functional.embedding(input_ids, weight) + update
    first = int(insert_after_first)
    return torch.cat((tokens[:, :first], prompt.repeat(batch, 1, 1), tokens[:, first:]), dim=1)


def base_model(name: str):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)


def dept_model(options):
    config = DePTConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=options.virtual_tokens,
        r=options.rank,
        max_length=options.max_length,
        init_text=options.init_text,
        tokenizer_name_or_path=options.model,
    )
    model = get_peft_model(base_model(options.model), config)
    return model, dept.param_groups(model, options.lr_prompt, options.lr_low_rank, lr_head=options.lr_head)


def prompt_tuning_model(options):
    """PEFT's own, with the same start and the same rates."""
    config = PromptTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=100,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=options.init_text,
        tokenizer_name_or_path=options.model,
    )
    model = get_peft_model(base_model(options.model), config)
    prompts = [p for name, p in model.named_parameters() if p.requires_grad and "prompt_encoder" in name]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and "prompt_encoder" not in name]
    return model, [{"params": prompts, "lr": options.lr_prompt}, {"params": rest, "lr": options.lr_head}]


def trainer_of(model, groups, options, tokenizer, train, dev, epochs: float, pad_to: int | None):
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
    optimizer = {} if groups is None else {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups, "lr": options.lr_low_rank})}
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


def run(make, options, tokenizer, train, dev, epochs: float, pad_to: int | None = None) -> tuple[dict, torch.nn.Module]:
    model, groups = make(options)
    trainer = trainer_of(model, groups, options, tokenizer, train, dev, epochs, pad_to)
    _, peak, seconds = peak_memory(trainer.train, "cuda" if torch.cuda.is_available() else "cpu")
    accuracy = trainer.evaluate()["eval_accuracy"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"accuracy": accuracy, "seconds_per_epoch": seconds / epochs, "peak_bytes": peak, "trained_parameters": trained}, model


def reloaded_accuracy(folder: Path, options, tokenizer, dev) -> float:
    model = PeftModel.from_pretrained(base_model(options.model), folder)
    return trainer_of(model, None, options, tokenizer, dev, dev, 1, None).evaluate()["eval_accuracy"]


def table(results: dict[str, dict]) -> Table:
    result = Table("method", "accuracy", "s / epoch", "peak MB", "trained parameters")
    for name, row in results.items():
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        result.add_row(name, f"{row['accuracy']:.1%}", f"{row['seconds_per_epoch']:.1f}", peak, f"{row['trained_parameters']:,}")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub id with a tokenizer")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/dept_sst2"))
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--rank", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a sentence; longer ones are cut")
    parser.add_argument("--init-text", default="is this sentence of a movie review positive or negative ?")
    parser.add_argument("--lr-prompt", type=float, default=3e-3)
    parser.add_argument("--lr-low-rank", type=float, default=3e-4, help="of A and B")
    parser.add_argument("--lr-head", type=float, default=5e-2, help="of the classification head")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--baseline-epochs", type=float, default=1, help="of the two baselines, which are there for time and memory; 0: none")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="training sentences; all by default")
    options = parser.parse_args()
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train = read(options.train, tokenizer, options.max_length, options.limit)
    dev = read(options.dev, tokenizer, options.max_length, None)

    results = {}
    results[OURS], model = run(dept_model, options, tokenizer, train, dev, options.epochs)
    model.save_pretrained(options.out)
    again = reloaded_accuracy(options.out, options, tokenizer, dev)
    if again != results[OURS]["accuracy"]:
        raise SystemExit(f"the adapter in {options.out} reaches {again:.4f} after loading, {results[OURS]['accuracy']:.4f} before")
    console.print(f"saved to {options.out} and loaded again: accuracy {again:.1%} both times")
    if options.baseline_epochs:
        baseline = partial(run, options=options, tokenizer=tokenizer, train=train, dev=dev, epochs=options.baseline_epochs)
        with patch.object(layer, "decomposed_prompt_embedding", official_formulation):
            results[OFFICIAL], _ = baseline(dept_model, pad_to=options.max_length)  # its batches have a fixed length
        results[PROMPT_TUNING], _ = baseline(prompt_tuning_model)
    console.print(table(results))
    if options.baseline_epochs:
        console.print(f"the accuracy of the last two is after {options.baseline_epochs:g} of {options.epochs:g} epochs")
    content = {"environment": environment(), "options": {k: str(v) for k, v in vars(options).items()}, "results": results}
    (options.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
