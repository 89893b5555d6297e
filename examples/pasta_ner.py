"""Train PASTA for named entity recognition with Trainer: a token classification head on a frozen encoder, entity F1 on
held-out sentences.

    python examples/pasta_ner.py --model PATH_OR_ID                                        sentences that this script
    makes python examples/pasta_ner.py --model PATH_OR_ID --train train.conll --dev dev.conll    your sentences

CoNLL format: each line has a word first and its tag last (O, B-TYPE, I-TYPE); an empty line separates sentences.
"""

import argparse
import random
from pathlib import Path

from peft import get_peft_model
from rich.console import Console
from sentences import table, write
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_kernels import PASTAConfig
from peft_kernels.perf.measure import peak_memory

# each of these may be a person, a place or a company, depending on the sentence
NAMES = (
    "Jordan",
    "Austin",
    "Florence",
    "Sydney",
    "Chelsea",
    "Victoria",
    "Carson",
    "Lincoln",
    "Madison",
    "Paris",
    "Hilton",
    "Orion",
)
NAMES += (
    "Delta",
    "Phoenix",
    "Dallas",
    "Savannah",
    "Morgan",
    "Charlotte",
    "Kimberley",
    "Wellington",
    "Houston",
    "Kent",
    "Denver",
    "Ford",
)
PATTERNS = (
    "PER met PER in LOC last week .",
    "Shares of ORG fell after PER resigned .",
    "ORG opens a new office in LOC .",
    "The mayor of LOC thanked ORG for its help .",
    "PER , who was born in LOC , now works for ORG .",
    "Heavy rain is expected near LOC on Monday .",
    "Nobody from ORG wanted to comment .",
    "The minister said that PER would visit LOC .",
    "PER drove from LOC to LOC in one day .",
    "ORG sold its stake in ORG to PER .",
)


def made(count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Sentences made from patterns: words and tags."""
    generator, sentences = random.Random(seed), []
    for _ in range(count):
        words, tags = [], []
        for word in generator.choice(PATTERNS).split():
            kind = word if word in ("PER", "LOC", "ORG") else None
            parts = generator.sample(NAMES, generator.choice((1, 2))) if kind else [word]
            words += parts
            tags += ["O"] if kind is None else [f"B-{kind}", *[f"I-{kind}"] * (len(parts) - 1)]
        sentences.append((words, tags))
    return sentences


def read_conll(path: Path) -> list[tuple[list[str], list[str]]]:
    sentences = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line.split() for line in block.splitlines() if line.strip() and not line.startswith("-DOCSTART-")]
        if lines:
            sentences.append(([line[0] for line in lines], [line[-1] for line in lines]))
    return sentences


def encode(sentences, tokenizer, tag_ids: dict[str, int], max_length: int) -> list[dict]:
    """Tokenize; the first piece of a word carries its tag."""
    encoded = tokenizer(
        [words for words, _ in sentences], is_split_into_words=True, truncation=True, max_length=max_length
    )
    rows = []
    for i, (_, tags) in enumerate(sentences):
        words, labels = encoded.word_ids(i), []
        for word, before in zip(words, [None, *words]):
            labels.append(-100 if word is None or word == before else tag_ids[tags[word]])
        rows.append({"input_ids": encoded["input_ids"][i], "labels": labels})
    return rows


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """The entities as (type, first word, one past the last word)."""
    spans, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        if start is not None and tag != f"I-{tags[start][2:]}":
            spans.add((tags[start][2:], start, i))
            start = None
        if start is None and tag != "O":
            start = i
    return spans


def scores(tags: list[str]):
    def compute(prediction) -> dict:
        correct = predicted = true = 0
        for logits, labels in zip(prediction.predictions, prediction.label_ids):
            kept = labels != -100
            got, expected = (entities([tags[i] for i in ids]) for ids in (logits[kept].argmax(-1), labels[kept]))
            correct, predicted, true = correct + len(got & expected), predicted + len(got), true + len(expected)
        return {"accuracy": 2 * correct / max(predicted + true, 1)}

    return compute


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub id with a tokenizer that is fast")
    parser.add_argument("--train", type=Path, help="CoNLL format; by default the script makes sentences")
    parser.add_argument("--dev", type=Path, help="CoNLL format")
    parser.add_argument("--out", type=Path, default=Path("results/pasta_ner"))
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--lr", type=float, default=3e-3, help="of vectors and head")
    options = parser.parse_args()
    if (options.train is None) != (options.dev is None):
        parser.error("--train and --dev come together")
    train, dev = (
        (made(800, 0), made(200, 1)) if options.train is None else (read_conll(options.train), read_conll(options.dev))
    )
    tags = sorted({tag for _, sentence in (*train, *dev) for tag in sentence})
    tag_ids = {tag: i for i, tag in enumerate(tags)}
    # RoBERTa needs it for pre-split words
    tokenizer = AutoTokenizer.from_pretrained(options.model, add_prefix_space=True)
    rows = {
        name: encode(sentences, tokenizer, tag_ids, options.max_length)
        for name, sentences in (("train", train), ("dev", dev))
    }

    results = {}
    for name in ("head alone", "PASTA"):
        set_seed(0)
        model = AutoModelForTokenClassification.from_pretrained(options.model, num_labels=len(tags))
        if name == "PASTA":
            config = PASTAConfig(task_type="TOKEN_CLS", num_special_tokens=2, tokenizer_name_or_path=options.model)
            model = get_peft_model(model, config)
        else:
            model.requires_grad_(False)
            model.classifier.requires_grad_()
        arguments = TrainingArguments(
            output_dir=str(options.out / "trainer"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr,
            weight_decay=0.0,
            save_strategy="no",
            report_to="none",
            seed=0,
        )
        collator = DataCollatorForTokenClassification(tokenizer)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows["train"],
            eval_dataset=rows["dev"],
            data_collator=collator,
            compute_metrics=scores(tags),
        )
        _, peak, seconds = peak_memory(trainer.train)
        results[name] = {
            "accuracy": trainer.evaluate()["eval_accuracy"],
            "seconds_per_epoch": seconds / options.epochs,
            "peak_bytes": peak,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
    model.save_pretrained(options.out)
    Console().print("accuracy: F1 of entities", table(results), sep="\n")
    write(options, results)


if __name__ == "__main__":
    main()
