"""Tiny random encoders, and PASTA's formula applied to stock models by hooks: the truth for the method."""

import copy

import torch
import transformers
from peft import get_peft_model

from peft_kernels import PASTAConfig

transformers.logging.set_verbosity_error()

VOCAB, PAD, CLS, SEP, MASK, WIDTH = 99, 1, 0, 2, 3, 32
SPECIAL = [CLS, SEP]
P = 3

_BERT = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
_DISTILBERT = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "dim": WIDTH,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "qa_dropout": 0.0,
    "initializer_range": 0.3,
}
_DEBERTA = dict(
    _BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False, pooler_dropout=0.0
)
_DEBERTA_CONV = dict(_DEBERTA, conv_kernel_size=3, position_buckets=4, norm_rel_ebd="layer_norm")
_MODERNBERT = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "cls_token_id": CLS,
    "sep_token_id": SEP,
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "local_attention": 8,
    "global_attn_every_n_layers": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}
_ALBERT = dict(_BERT, embedding_size=16, num_hidden_layers=4, classifier_dropout_prob=0.0)
_T5 = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
}

# name -> (prefix of its classes, settings, path of its layers below the head)
FAMILIES = {
    "bert": ("Bert", _BERT, "encoder.layer"),
    "roberta": ("Roberta", _BERT, "encoder.layer"),
    "xlm-roberta": ("XLMRoberta", _BERT, "encoder.layer"),
    "camembert": ("Camembert", _BERT, "encoder.layer"),
    "electra": ("Electra", dict(_BERT, embedding_size=16), "encoder.layer"),
    "deberta": ("Deberta", _DEBERTA, "encoder.layer"),
    "deberta-v2": ("DebertaV2", _DEBERTA_CONV, "encoder.layer"),  # layer 0 also has a convolution over the raw input
    "distilbert": ("DistilBert", _DISTILBERT, "transformer.layer"),
    "mpnet": ("MPNet", _BERT, "encoder.layer"),
    "modernbert": ("ModernBert", _MODERNBERT, "layers"),
    "albert": ("Albert", _ALBERT, None),
    "albert-groups": ("Albert", dict(_ALBERT, num_hidden_groups=2, inner_group_num=2), None),
}
GENERIC = {
    "longformer": ("Longformer", dict(_BERT, attention_window=4), "encoder.layer"),  # pads its input on the right
    "nystromformer": ("Nystromformer", _BERT, "encoder.layer"),
    "megatron-bert": ("MegatronBert", _BERT, "encoder.layer"),  # pre-norm
    "mobilebert": ("MobileBert", dict(_BERT, embedding_size=16, intra_bottleneck_size=16), "encoder.layer"),
    "t5": ("T5", _T5, "encoder.block"),
}
TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
    None: "ForMaskedLM",
}


def stock(family: str, task: str | None = "SEQ_CLS", **settings) -> transformers.PreTrainedModel:
    """The model alone, in eval mode."""
    prefix, defaults, _ = (FAMILIES | GENERIC)[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**defaults | settings)
    kind = "EncoderModel" if family == "t5" else TASKS[task]
    return getattr(transformers, prefix + kind)(config).eval()


def adapted(family: str, task: str | None = "SEQ_CLS", base=None, seed: int = 1, **config):
    """A model with one adapter whose vectors are as large as hidden states."""
    base = stock(family, task) if base is None else base
    settings = {"num_special_tokens": P, "special_token_ids": SPECIAL, "task_type": task, "dropout": 0.0}
    model = get_peft_model(base, PASTAConfig(**settings | config)).eval()
    fill(model, "default", seed)
    return model


def pair(family: str, task: str | None = "SEQ_CLS", **config):
    """Stock and adapted models with the same weights."""
    base = stock(family, task)
    return base, adapted(family, task, copy.deepcopy(base), **config)


def fill(model, adapter: str, seed: int) -> None:
    with torch.no_grad():
        v = vectors(model, adapter)
        v.copy_(torch.randn(v.shape, generator=torch.Generator().manual_seed(seed)))


def vectors(model, adapter: str = "default") -> torch.nn.Parameter:  # [L, P, d]
    return model.base_model.model.pasta.pasta_vectors[adapter]


def layers(family: str, model) -> list:
    """The layers of a stock or an unwrapped model, below its head, one for each pass."""
    encoder, path = model.base_model, (FAMILIES | GENERIC)[family][2]
    if path is not None:
        return list(encoder.get_submodule(path))
    groups = encoder.encoder.albert_layer_groups
    passes = encoder.config.num_hidden_layers
    return [layer for i in range(passes) for layer in groups[i * len(groups) // passes].albert_layers]


def inputs(b: int = 4, n: int = 11, padding: str = "right", seed: int = 2) -> dict[str, torch.Tensor]:
    """Rows with 2, 3, 2, 3 … special tokens, one of them [MASK]ed; all but the first are padded."""
    ids = torch.randint(4, VOCAB, (b, n), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for i in range(b):
        pads = 2 * (i % 3)
        ids[i, 0], ids[i, n - pads - 1], ids[i, 2] = CLS, SEP, MASK
        if i % 2:
            ids[i, 4] = SEP
        ids[i, n - pads :] = PAD
        mask[i, n - pads :] = 0
        if padding == "left":
            ids[i], mask[i] = ids[i].roll(pads), mask[i].roll(pads)
    return {"input_ids": ids, "attention_mask": mask}


def targets(task: str | None, x: dict, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b, n = x["input_ids"].shape
    if task == "SEQ_CLS":
        return {"labels": torch.randint(0, 2, (b,), generator=generator)}
    if task == "TOKEN_CLS":
        return {"labels": torch.randint(0, 2, (b, n), generator=generator).masked_fill(x["attention_mask"] == 0, -100)}
    if task == "QUESTION_ANS":
        return {k: torch.randint(0, n, (b,), generator=generator) for k in ("start_positions", "end_positions")}
    return (
        {} if task == "FEATURE_EXTRACTION" else {"labels": x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)}
    )


def main(output) -> torch.Tensor:
    return next(output[k] for k in ("logits", "start_logits", "last_hidden_state") if k in output)


def loss_of(output) -> torch.Tensor:
    return output["loss"] if output.get("loss") is not None else main(output).square().mean()


def slots(x: dict, special=SPECIAL) -> list[list[int]]:
    """The positions of each row's special tokens, in order."""
    ids, mask = x["input_ids"].tolist(), x["attention_mask"].tolist()
    return [[s for s, token in enumerate(row) if token in special and shown[s]] for row, shown in zip(ids, mask)]


def dense(x: dict, v: torch.Tensor) -> torch.Tensor:
    """The vectors ``v`` (P, d), or (B, P, d) for each row, at the positions where the formula adds them: (B, S, d)."""
    b, n = x["input_ids"].shape
    v = v.expand(b, *v.shape[-2:])
    one_hot = v.new_zeros(b, n, v.shape[1])
    for i, row in enumerate(slots(x)):
        for j, s in enumerate(row):
            one_hot[i, s, min(j, v.shape[1] - 1)] = 1
    return one_hot @ v


class by_formula:
    """Context in which the layers of a stock model get ``additions`` (L of (B, S, d)) added to their input."""

    def __init__(self, family: str, model, additions):
        self.layers, self.additions = layers(family, model), list(additions)

    def __enter__(self):
        self.remaining = iter(self.additions)
        self.handles = [layer.register_forward_pre_hook(self.add) for layer in dict.fromkeys(self.layers)]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def add(self, module, args):
        addition = next(self.remaining)
        padded = torch.nn.functional.pad(addition, (0, 0, 0, args[0].shape[1] - addition.shape[1]))
        return args[0] + padded, *args[1:]


def formula(family: str, model, v: torch.Tensor, x: dict, **kwargs):
    """The output of a stock ``model`` for ``x`` with the vectors ``v`` (L, P, d)."""
    with by_formula(family, model, [dense(x, layer) for layer in v]):
        return model(**x, **kwargs)


def heads(model) -> dict[str, torch.nn.Parameter]:
    """The parameters that PEFT trains besides the vectors, under the stock model's names."""
    trained = {n: p for n, p in model.base_model.model.named_parameters() if ".modules_to_save.default." in n}
    return {n.replace(".modules_to_save.default.", "."): p for n, p in trained.items()}
