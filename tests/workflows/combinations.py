"""The combinations of methods in the matrix, on tiny random models."""

import torch
import transformers
from accuracy import WithinRounding, assert_no_near_tie
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from peft_kernels import DePTConfig, PASTAConfig, dect, pasta, pid, ytuning

transformers.logging.set_verbosity_error()

_T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_BERT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "was", "good", "bad", "a", "film", "."]

ADAPTERS = {
    "LoRA": lambda task: LoraConfig(
        task_type=task, r=4, target_modules=["q", "v"] if task == "SEQ_2_SEQ_LM" else ["query", "value"]
    ),
    "IA3": lambda task: IA3Config(
        task_type=task,
        target_modules=["k", "v"] if task == "SEQ_2_SEQ_LM" else ["key", "value"],
        feedforward_modules=[],
    ),
    "prompt tuning": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "prefix tuning": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "DePT": lambda task: DePTConfig(task_type=task, num_virtual_tokens=3, r=2, max_length=16),
    "PASTA": lambda task: PASTAConfig(task_type=task, num_special_tokens=2, special_token_ids=[2, 3], dropout=0.0),
}

SEQ_2_SEQ = [
    "PiD",
    "PiD, LoRA",
    "PiD, IA3",
    "PiD, DePT",
    "PiD, prompt tuning",
    "PiD, prefix tuning",
    "DePT",
    "DePT, LoRA",
    "LoRA, DePT",
]
SEQ_2_SEQ += ["DePT, prompt tuning", "PiD, DePT, LoRA"]
SEQ_CLS = ["DePT on BERT", "PASTA", "PASTA, fuse", "PASTA, LoRA", "LoRA, PASTA, fuse", "fuse, IA3, PASTA"]
FROZEN = ["DecT", "Y-Tuning"]


def t5() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5, initializer_factor=2.0)).eval()


def bert(head: str = "SequenceClassification") -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**_BERT)).eval()


def tokenizer(folder):
    file = folder / "vocab.txt"
    file.write_text("\n".join(_WORDS) + "\n")
    return transformers.BertTokenizerFast(vocab=str(file), vocab_file=str(file), model_max_length=16)


def put_on(model, name: str):
    """Add one method; its adapter parameters are random and reproducible."""
    if name == "PiD":
        return pid.enable(model)
    if name == "fuse":
        pasta.fuse(model)
        return model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = {id(p) for p in model.parameters()}
    model = get_peft_model(
        model, ADAPTERS[name]("SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "SEQ_CLS")
    ).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for name, p in model.named_parameters():
            # a trained head stays after unload
            if id(p) not in before and p.requires_grad and "modules_to_save" not in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def build(combination: str, folder, without: tuple[str, ...] = ()):
    """The model of a combination. ``without``: methods to leave out."""
    if combination == "DecT":
        return _dect(folder)
    if combination == "Y-Tuning":
        torch.manual_seed(0)
        config = ytuning.YTuningConfig(
            hidden_size=32, num_attention_heads=4, intermediate_size=48, hidden_dropout_prob=0.0, num_labels=3
        )
        return ytuning.YTuningForSequenceClassification(config).eval()
    model = t5() if combination in SEQ_2_SEQ else bert()
    for name in combination.removesuffix(" on BERT").split(", "):
        if name not in without:
            model = put_on(model, name)
    return model


def _dect(folder):
    t, model = tokenizer(folder), bert("MaskedLM")
    texts, words = ["a good film", "bad", "it was bad", "good film ."], [["bad"], ["good"]]
    extraction = dect.extract(model, t, texts, "{text} it was {mask} .", words)
    classifier = dect.DecoderTuning(dim=8, empty_scores=extraction.empty_scores).fit(
        extraction.features, [1, 0, 0, 1], extraction.scores
    )
    return dect.DecTForSequenceClassification.from_classifier(classifier, model, t, "{text} it was {mask} .", words)


def inputs(combination: str, seed: int = 1) -> dict:
    """Two rows, the second padded; with labels if the loss needs them."""
    generator = torch.Generator().manual_seed(seed)
    if combination == "Y-Tuning":
        features = torch.randn(2, 6, 32, generator=generator)
        return {"features": features, "lengths": torch.tensor([6, 4]), "labels": torch.tensor([0, 2])}
    ids = torch.randint(11, 99, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    if combination in SEQ_2_SEQ:
        streams = 4 if combination.startswith("PiD") else 2
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.randint(4, 99, (streams, 4), generator=generator),
        }
    ids[:, 0], ids[0, 6], ids[1, 4] = 2, 3, 3
    if combination == "DecT":
        ids[:, 3] = 4
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}


def repeated(x: dict) -> dict:
    """The inputs of PiD in the stock model's form: a row for each stream."""
    streams = x["labels"].shape[0] // x["input_ids"].shape[0]
    return {k: v if k == "labels" else v.repeat_interleave(streams, 0) for k, v in x.items()}


@torch.no_grad()
def result(model, x: dict, tokens: bool = True, numbers: bool = True) -> dict:
    """The visible results of a call: tokens of a beam search and the loss, or logits."""
    if not ("labels" in x and hasattr(model, "generate") and model.config.is_encoder_decoder):
        return {"logits": model(**x).logits}
    asked, found = {k: x[k] for k in ("input_ids", "attention_mask")}, {}
    if tokens:
        found["tokens"] = model.generate(**asked, num_beams=2, max_new_tokens=5, min_new_tokens=5)
    return found | ({"loss": model(**x).loss} if numbers else {})


class Expected:
    """The expected output of ``model`` for ``x``: numbers up to rounding, and tokens that rounding does not decide."""

    def __init__(self, model, x: dict):
        self.tokens = result(model, x, numbers=False).get("tokens")
        if self.tokens is not None:
            assert_no_near_tie(lambda: result(model, x, numbers=False)["tokens"], self.tokens)
        self.numbers = WithinRounding(lambda: result(model, x, tokens=False))

    def check(self, got: dict):
        self.check_tokens(got.get("tokens"))
        self.numbers.check({name: x for name, x in got.items() if name != "tokens"})

    def check_tokens(self, got: torch.Tensor | None):
        assert (got is None) == (self.tokens is None) and (got is None or torch.equal(got, self.tokens)), (
            f"got {got}, expected {self.tokens}"
        )


def assert_same(got: dict, model, x: dict):
    Expected(model, x).check(got)
