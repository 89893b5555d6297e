"""Y-Tuning on SST-2: the features of a frozen encoder are cached once, then label blocks are trained on them with
Trainer, saved and loaded.

    pip install scikit-learn
    python examples/ytuning_sst2.py --model PATH_OR_ID --train train.tsv --dev dev.tsv

Compared with a logistic regression on the means of the same features and, with --against finetuning dept, with these
two trained until they are as accurate on dev. Later runs reuse the cache in --out.

The defaults of the label blocks are ours; the paper uses others for larger models. They come from a small search on dev
with a MiniLM of 6 layers: 1 or 2 blocks, lr 2e-4 to 1e-3, dropout 0.1 or 0.3, weight decay 0 or 0.1, both losses, 5 or
10 epochs, the best of these with three seeds. None was better than the defaults by more than the difference between
seeds.
"""

import argparse
import time
from pathlib import Path

import against
import torch
from rich.console import Console
from sentences import add_arguments, read, trainer_of, write
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from peft_kernels.ytuning import (
    CachedFeatures,
    FeatureCollator,
    YTuningConfig,
    YTuningForSequenceClassification,
    cache_features,
)

OURS, PROBE = "Y-Tuning", "logistic regression on means"


def cached(name: str, path: Path, model, tokenizer, options) -> CachedFeatures:
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if name == "train":
        rows = rows[: options.limit]
    dtype = getattr(torch, options.dtype)
    folder = cache_features(
        model,
        tokenizer,
        [text for text, _ in rows],
        options.out / name,
        batch_size=64,
        dtype=dtype,
        max_length=options.max_length,
    )
    return CachedFeatures(folder, [int(label) for _, label in rows])


def probe(train: CachedFeatures, dev: CachedFeatures) -> dict:
    start = time.perf_counter()
    means = [torch.stack([data[i]["features"].float().mean(0) for i in range(len(data))]) for data in (train, dev)]
    regression = LogisticRegression(max_iter=2000).fit(means[0], train.labels)
    seconds = time.perf_counter() - start
    return {
        "accuracy": regression.score(means[1], dev.labels),
        "training_seconds": seconds,
        "trained_parameters": regression.coef_.size + 1,
    }


def trainer_on(model, options, tokenizer, train, dev):
    groups = [{"params": list(model.parameters()), "lr": options.lr}]
    trainer = trainer_of(model, groups, options, tokenizer, train, dev, options.epochs)
    trainer.data_collator = FeatureCollator()
    return trainer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    against.add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("results/ytuning_sst2"))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the cached features")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--width", type=int, default=384, help="of a block's feed-forward part")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--loss", choices=("triplet", "cross_entropy"), default="triplet")
    parser.add_argument("--margin", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--epochs", type=float, default=5)
    options = parser.parse_args()
    console = Console()
    tokenizer, backbone = AutoTokenizer.from_pretrained(options.model), AutoModel.from_pretrained(options.model)
    start = time.perf_counter()
    train, dev = (
        cached(name, path, backbone, tokenizer, options)
        for name, path in (("train", options.train), ("dev", options.dev))
    )
    extraction = time.perf_counter() - start

    results = {PROBE: probe(train, dev) | {"extraction_seconds": extraction}}
    torch.manual_seed(0)
    config = YTuningConfig(
        hidden_size=backbone.config.hidden_size,
        num_attention_heads=backbone.config.num_attention_heads,
        num_blocks=options.blocks,
        intermediate_size=options.width,
        hidden_dropout_prob=options.dropout,
        loss=options.loss,
        margin=options.margin,
        num_labels=2,
        backbone=options.model,
    )
    model = YTuningForSequenceClassification(config)
    trainer = trainer_on(model, options, tokenizer, train, dev)
    start = time.perf_counter()
    trainer.train()
    training = time.perf_counter() - start
    accuracy = trainer.evaluate()["eval_accuracy"]
    model.save_pretrained(options.out)
    loaded = AutoModelForSequenceClassification.from_pretrained(options.out)
    again = trainer_on(loaded, options, tokenizer, dev, dev).evaluate()["eval_accuracy"]
    if again != accuracy:
        raise SystemExit(f"the model in {options.out} reaches {again:.4f} after loading, {accuracy:.4f} before")
    console.print(f"saved to {options.out} and loaded again: accuracy {accuracy:.1%} both times")
    results[OURS] = {
        "accuracy": accuracy,
        "trained_parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
    }
    results[OURS] |= {"extraction_seconds": extraction, "training_seconds": training}
    if options.against:
        texts = (
            read(options.train, tokenizer, options.max_length, options.limit),
            read(options.dev, tokenizer, options.max_length),
        )
        results |= against.run(options, tokenizer, *texts, accuracy)
    console.print(against.cost_table(results, "all of train; extraction: once, or what reading the cache took"))
    write(options, results)


if __name__ == "__main__":
    main()
