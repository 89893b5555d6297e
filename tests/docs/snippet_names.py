"""The names that snippets use without making them: tiny random models, a tokenizer, tensors of shapes that fit each other."""

from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizerFast, T5Config, T5ForConditionalGeneration

from peft_kernels.perf.results import OURS, Row, measured

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEXTS = ["a great film", "the plot was thin", "a good film", "it was terrible"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "was", ".", "great", "good", "terrible", "a", "film", "the", "plot", "thin"]
BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}


def pid(folder: Path) -> dict:
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    input_ids, labels = torch.randint(2, 99, (2, 9)), torch.randint(2, 99, (6, 4))
    return {
        "model": T5ForConditionalGeneration(config).eval(),
        "inputs": {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)},
        "input_ids": input_ids,
        "labels": labels,
        "prompts": [[5, 6, 7], [8]],
        "x": input_ids,
        "y": labels,
        "i": 0,
        "u": 1,
    }


def classifier(folder: Path) -> dict:
    """For DePT and PASTA, which finds its special tokens by the tokenizer that the model's name leads to."""
    tokenizer = _tokenizer(folder)
    tokenizer.save_pretrained(folder / "model")
    config = BertConfig(num_labels=2, name_or_path=str(folder / "model"), **BERT)
    return {
        "torch": torch,
        "get_peft_model": get_peft_model,
        "model": BertForSequenceClassification(config),
        "fresh_model": BertForSequenceClassification(config),
        "inputs": tokenizer(TEXTS, return_tensors="pt", padding=True),
        "labels": torch.tensor([1, 0, 1, 0]),
    }


def frozen(folder: Path) -> dict:
    """For DecT and Y-Tuning."""
    model = BertForMaskedLM(BertConfig(**BERT)).eval()
    return {"model": model, "encoder": model.bert, "tokenizer": _tokenizer(folder), "texts": TEXTS, "labels": [1, 0, 1, 0]}


def ops(folder: Path) -> dict:
    """What the README hands to the operators."""
    batch, length, width, vocabulary, classes = 4, 12, 48, 99, 3
    query, key = (6, 2, 1, 16), (batch, 2, length, 16)
    shapes = {
        "query": query,
        "key": key,
        "value": key,
        "weight": (vocabulary, width),
        "prompt": (8, width),
        "a": (length, 4),
        "b": (4, width),
        "hidden": (batch, length, width),
        "vectors": (2, width),
        "x": (batch, length, width),
        "residual": (batch, length, width),
        "gain": (width,),
        "bias": (width,),
        "rows": (batch, width),
        "projection": (16, width),
        "prototypes": (classes, 16),
        "radius": (classes,),
        "scores": (batch, classes),
        "label_slots": (1 + classes, width),
        "features": (batch, length, width),
        **dict.fromkeys(("w_q", "w_k", "w_v"), (width, width)),
    }
    input_ids = torch.randint(3, vocabulary, (batch, length))
    input_ids[:, 0], input_ids[:, -1] = 0, 2
    return {
        **{name: torch.randn(shape) for name, shape in shapes.items()},
        "input_ids": input_ids,
        "mask": torch.ones_like(input_ids),
        "special_ids": [0, 2],
        "scale": 4.0,
        "lengths": torch.tensor([12, 7, 1, 0]),
        "index": torch.tensor([0, 0, 0, 1, 2, 3]),
        "label_ids": torch.tensor([[7, -1], [8, 9], [5, -1]]),
        "positions": torch.tensor([3, 5, 5, 11]),
    }


def report(folder: Path) -> dict:
    """A file as the commands that measure write it."""
    what = {"benchmark": "label_logits", "shape": {"B": 4, "H": 32}, "dtype": "float32", "phase": "forward"}
    rows = [Row(**what, candidate=OURS, median_s=2.0, roofline_s=1.0), Row(**what, candidate="another", missing="not installed")]
    path = folder / "results.json"
    measured(rows, "cpu").write(path)
    return {"path": path}


NAMES = {"pid": pid, "dept": classifier, "pasta": classifier, "dect": frozen, "ytuning": frozen, "ops": ops, "report": report}


def _tokenizer(folder: Path) -> BertTokenizerFast:
    file = folder / "vocab.txt"
    file.write_text("\n".join(WORDS) + "\n")
    return BertTokenizerFast(vocab=str(file), vocab_file=str(file), model_max_length=64)
