"""Decoder tuning (DecT) on SST-2: extracts features once from a frozen model, then trains few-shot classifiers in
milliseconds each.

    python examples/dect_sst2.py --model PATH_OR_ID --train train.tsv --dev dev.tsv

The model is a masked or causal language model or T5, or an encoder without a head, which has no scores. Every
classifier is compared with a logistic regression (scikit-learn) on the same features. With --against finetuning dept
these two are trained on the shots of the first seed until they are as accurate on dev as DecT with that seed.
"""

import argparse
import statistics
import time
from pathlib import Path

import against
import torch
from rich.console import Console
from rich.table import Table
from sentences import add_arguments, read, write
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from peft_kernels import dect

HEADS = {"masked": AutoModelForMaskedLM, "causal": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM, "none": AutoModel}
OURS = "DecT"
SHOTS, SEEDS = (1, 4, 16, 64, 256), range(5)


def extracted(options, name: str, path: Path, model, tokenizer):
    """Features of a file's sentences, and labels."""
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts, labels = zip(*lines[: options.limit if name == "train" else None])
    words = None if options.head == "none" else [options.negative, options.positive]
    extraction = dect.extract(
        model,
        tokenizer,
        texts,
        options.template,
        words,
        batch_size=options.batch_size,
        max_length=options.max_length,
        cache=options.out / f"{name}.safetensors",
    )
    return extraction, torch.tensor([int(label) for label in labels])


def few(labels: torch.Tensor, shots: int, seed: int) -> torch.Tensor:
    """Indices of ``shots`` texts of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == k][:shots] for k in (0, 1)])


def compare(train, train_labels, dev, dev_labels, options, shots: int) -> dict:
    runs_of = {OURS: [], "logistic regression": []}
    for seed in SEEDS:
        indices = few(train_labels, shots, seed)
        features, labels = train.features[indices], train_labels[indices]
        scores = None if train.scores is None else train.scores[indices]
        classifier = dect.DecoderTuning(calibration=options.calibration, empty_scores=train.empty_scores, seed=seed)
        start = time.perf_counter()
        classifier.fit(features, labels, scores)
        seconds = time.perf_counter() - start
        trained = classifier.head_.projection.numel() + classifier.head_.radius.numel()
        runs_of[OURS].append((classifier.score(dev.features, dev_labels, dev.scores), seconds, trained))
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        start = time.perf_counter()
        regression.fit(features.numpy(), labels.numpy())
        seconds = time.perf_counter() - start
        runs_of["logistic regression"].append(
            (regression.score(dev.features.numpy(), dev_labels.numpy()), seconds, features.shape[1] + 1)
        )
    result = {}
    for name, runs in runs_of.items():
        accuracies, seconds, (trained, *_) = zip(*runs)
        result[name] = {
            "accuracy": statistics.mean(accuracies),
            "deviation": statistics.stdev(accuracies),
            "accuracies": accuracies,
        }
        result[name] |= {"training_seconds": statistics.median(seconds), "trained_parameters": trained}
    return result


def compare_training(options, tokenizer, labels: torch.Tensor, results: dict) -> None:
    """Train the methods of --against on the shots of the first seed until they are as accurate as DecT, and add them to
    ``results``.
    """
    train, dev = (
        read(options.train, tokenizer, options.max_length, options.limit),
        read(options.dev, tokenizer, options.max_length),
    )
    for shots, methods in results.items():
        rows = [train[i] for i in few(labels, int(shots), SEEDS[0]).tolist()]
        methods |= against.run(options, tokenizer, rows, dev, methods[OURS]["accuracies"][0])


def table(results: dict) -> Table:
    result = Table(
        "shots",
        "method",
        "trained numbers",
        "accuracy",
        "training, ms",
        title="mean and standard deviation over 5 seeds",
    )
    for shots, methods in results.items():
        for name, row in methods.items():
            accuracy = (
                f"{row['accuracy']:.1%} ± {row['deviation']:.1%}"
                if "deviation" in row
                else f"{row['accuracy']:.1%}, first seed"
            )
            result.add_row(
                shots, name, f"{row['trained_parameters']:,}", accuracy, f"{row['training_seconds'] * 1e3:,.1f}"
            )
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    against.add_arguments(parser)
    parser.add_argument(
        "--head", choices=list(HEADS), default="masked", help="what the model predicts with; none: an encoder alone"
    )
    parser.add_argument("--template", default="{text} It was {mask}.", help="a causal model's ends with {mask}")
    parser.add_argument("--negative", nargs="+", default=["terrible"], help="label words")
    parser.add_argument("--positive", nargs="+", default=["great"])
    parser.add_argument("--calibration", choices=("official", "logprob", "none"), default="official")
    parser.add_argument("--out", type=Path, default=Path("results/dect_sst2"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = HEADS[options.head].from_pretrained(options.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    train, train_labels = extracted(options, "train", options.train, model, tokenizer)
    dev, dev_labels = extracted(options, "dev", options.dev, model, tokenizer)
    seconds = time.perf_counter() - start
    most = int(train_labels.bincount().min())
    results = {str(n): compare(train, train_labels, dev, dev_labels, options, n) for n in SHOTS if n <= most}
    if options.against:
        compare_training(options, tokenizer, train_labels, results)
    console = Console()
    console.print(table(results))
    console.print(
        f"features of {len(train_labels) + len(dev_labels):,} texts: {seconds:.1f} s, or what reading the cache took"
    )
    write(options, {"extraction_seconds": seconds, "shots": results})


if __name__ == "__main__":
    main()
