"""Train PASTA on SST-2 with Trainer, save the adapter and load it again; compare full fine-tuning and a probe on the
frozen features.

    pip install scikit-learn
    python examples/pasta_sst2.py --model PATH_OR_ID --train train.tsv --dev dev.tsv

The model is any BERT-like encoder; its weights stay frozen. The probe is a logistic regression on the mean of the last
hidden states.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from sentences import add_arguments, base_model, read, table, train_and_evaluate, trainer_of, write
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from peft_kernels import PASTAConfig

OURS, FULL, PROBE = "PASTA", "full fine-tuning", "probe on frozen features"


def pasta_model(options):
    config = PASTAConfig(task_type="SEQ_CLS", num_special_tokens=2, tokenizer_name_or_path=options.model)
    model = get_peft_model(base_model(options.model), config)
    vectors = [p for name, p in model.named_parameters() if p.requires_grad and "pasta_" in name]
    head = [p for name, p in model.named_parameters() if p.requires_grad and "pasta_" not in name]
    return (
        model,
        [{"params": vectors, "lr": options.lr_vectors}, {"params": head, "lr": options.lr_head}],
        sum(p.numel() for p in vectors),
    )


def features(model, tokenizer, rows: list[dict]) -> torch.Tensor:
    """Means of the last hidden states over the tokens, (rows, d)."""
    collate, means = DataCollatorWithPadding(tokenizer), []
    for start in range(0, len(rows), 64):
        batch = collate([{"input_ids": row["input_ids"]} for row in rows[start : start + 64]])
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        means.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(means)


def probe(options, tokenizer, train, dev) -> dict:
    model = AutoModel.from_pretrained(options.model).eval()
    start = time.perf_counter()
    inputs, labels = features(model, tokenizer, train), [row["labels"] for row in train]
    regression = LogisticRegression(max_iter=2000).fit(inputs, labels)
    seconds = time.perf_counter() - start
    accuracy = regression.score(features(model, tokenizer, dev), [row["labels"] for row in dev])
    return {"accuracy": accuracy, "seconds_per_epoch": seconds, "trained_parameters": regression.coef_.size + 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("results/pasta_sst2"))
    parser.add_argument("--lr-vectors", type=float, default=1e-2)
    parser.add_argument("--lr-head", type=float, default=1e-2, help="of the classification head")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--full-epochs", type=float, default=1, help="of full fine-tuning; 0: none")
    parser.add_argument("--lr-full", type=float, default=5e-5, help="of full fine-tuning")
    options = parser.parse_args()
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train = read(options.train, tokenizer, options.max_length, options.limit)
    dev = read(options.dev, tokenizer, options.max_length)

    results = {PROBE: probe(options, tokenizer, train, dev)}
    model, groups, vectors = pasta_model(options)
    results[OURS] = train_and_evaluate(model, groups, options, tokenizer, train, dev, options.epochs)
    model.save_pretrained(options.out)
    loaded = PeftModel.from_pretrained(base_model(options.model), options.out)
    again = trainer_of(loaded, None, options, tokenizer, dev, dev, 1).evaluate()["eval_accuracy"]
    if again != results[OURS]["accuracy"]:
        raise SystemExit(
            f"the adapter in {options.out} reaches {again:.4f} after loading, {results[OURS]['accuracy']:.4f} before"
        )
    console.print(f"saved to {options.out} and loaded again: accuracy {again:.1%} both times")
    if options.full_epochs:
        full = base_model(options.model)
        groups = [{"params": list(full.parameters()), "lr": options.lr_full}]
        results[FULL] = train_and_evaluate(full, groups, options, tokenizer, train, dev, options.full_epochs)
    console.print(table(results))
    total = sum(p.numel() for p in loaded.parameters())
    head = results[OURS]["trained_parameters"] - vectors
    console.print(
        f"PASTA trains {vectors:,} numbers in vectors, {vectors / total:.3%} of the model, and {head:,} in the head"
    )
    results[OURS] |= {"parameters_in_vectors": vectors, "parameters_in_head": head}
    write(options, results)


if __name__ == "__main__":
    main()
