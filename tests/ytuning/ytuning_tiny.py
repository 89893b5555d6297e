"""A tiny backbone with its tokenizer, texts, and label blocks for them."""

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from peft_kernels.ytuning import YTuningConfig, YTuningForSequenceClassification

WORDS = [f"w{i}" for i in range(40)]
WIDTH = 32


def backbone(seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=45,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


def tokenizer(folder):
    file = folder / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return BertTokenizerFast(vocab=str(file), vocab_file=str(file), model_max_length=64)


def texts(count=24, seed=0):
    """Texts whose label is whether they begin with w1."""
    generator = torch.Generator().manual_seed(seed)
    rows, labels = [], []
    for i in range(count):
        words = [WORDS[j] for j in torch.randint(2, 40, (1 + i * 5 % 11,), generator=generator)]
        rows.append(" ".join([WORDS[i % 2], *words]))
        labels.append(i % 2)
    return rows, labels


def model(seed=0, **changed):
    torch.manual_seed(seed)
    options = {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "hidden_dropout_prob": 0.0,
        "num_labels": 3,
    }
    return YTuningForSequenceClassification(YTuningConfig(**{**options, **changed})).eval()
