"""Tiny random models for every task, and DePT's formula written out with stock transformers: the truth for the
method.
"""

import copy
import math

import torch
import transformers
from peft import get_peft_model

from peft_kernels import DePTConfig

transformers.logging.set_verbosity_error()

VOCAB, PAD, EOS, WIDTH = 99, 0, 1, 32
M, R, S = 5, 3, 12  # prompt rows, rank, max_length

_COMMON = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 3}
_T5 = dict(
    _COMMON,
    d_model=WIDTH,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=3,
    decoder_start_token_id=0,
    dropout_rate=0.0,
    initializer_factor=1.5,
)
_BART = dict(
    _COMMON,
    d_model=WIDTH,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
    dropout=0.0,
    attention_dropout=0.0,
    init_std=0.3,
)
_SCALED = dict(_BART, scale_embedding=True)
_BERT = dict(
    _COMMON,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.3,
)
_DISTILBERT = dict(
    _COMMON,
    dim=WIDTH,
    n_layers=2,
    n_heads=4,
    hidden_dim=48,
    max_position_embeddings=64,
    dropout=0.0,
    attention_dropout=0.0,
)
_GPT2 = dict(
    _COMMON,
    n_embd=WIDTH,
    n_layer=2,
    n_head=4,
    n_positions=64,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    initializer_range=0.3,
)
_LLAMA = dict(
    _COMMON, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, initializer_range=0.3
)
_GEMMA = dict(_LLAMA, num_key_value_heads=2, head_dim=8)

# name -> (config class, settings, model class, task type, prompt after the first token, embedding scale)
MODELS = {
    "t5": ("T5Config", _T5, "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", False, 1.0),
    "bart": ("BartConfig", _BART, "BartForConditionalGeneration", "SEQ_2_SEQ_LM", False, 1.0),
    "bart-scaled": ("BartConfig", _SCALED, "BartForConditionalGeneration", "SEQ_2_SEQ_LM", False, math.sqrt(WIDTH)),
    "m2m_100": ("M2M100Config", _SCALED, "M2M100ForConditionalGeneration", "SEQ_2_SEQ_LM", False, math.sqrt(WIDTH)),
    "pegasus": ("PegasusConfig", _SCALED, "PegasusForConditionalGeneration", "SEQ_2_SEQ_LM", False, math.sqrt(WIDTH)),
    "marian": (
        "MarianConfig",
        dict(_SCALED, decoder_vocab_size=VOCAB),
        "MarianMTModel",
        "SEQ_2_SEQ_LM",
        False,
        math.sqrt(WIDTH),
    ),
    "gpt2": ("GPT2Config", _GPT2, "GPT2LMHeadModel", "CAUSAL_LM", False, 1.0),
    "llama": ("LlamaConfig", _LLAMA, "LlamaForCausalLM", "CAUSAL_LM", False, 1.0),
    "gemma": ("GemmaConfig", _GEMMA, "GemmaForCausalLM", "CAUSAL_LM", False, torch.tensor(math.sqrt(WIDTH)).item()),
    "bert-sequence": ("BertConfig", _BERT, "BertForSequenceClassification", "SEQ_CLS", True, 1.0),
    "roberta-sequence": ("RobertaConfig", _BERT, "RobertaForSequenceClassification", "SEQ_CLS", True, 1.0),
    "distilbert-sequence": (
        "DistilBertConfig",
        _DISTILBERT,
        "DistilBertForSequenceClassification",
        "SEQ_CLS",
        True,
        1.0,
    ),
    "gpt2-sequence": ("GPT2Config", _GPT2, "GPT2ForSequenceClassification", "SEQ_CLS", False, 1.0),
    "bert-token": ("BertConfig", _BERT, "BertForTokenClassification", "TOKEN_CLS", True, 1.0),
    "llama-token": ("LlamaConfig", _LLAMA, "LlamaForTokenClassification", "TOKEN_CLS", False, 1.0),
    "roberta-qa": ("RobertaConfig", _BERT, "RobertaForQuestionAnswering", "QUESTION_ANS", True, 1.0),
    "bert-features": ("BertConfig", _BERT, "BertModel", "FEATURE_EXTRACTION", True, 1.0),
    "t5-encoder": ("T5Config", _T5, "T5EncoderModel", "FEATURE_EXTRACTION", False, 1.0),
    "bert-masked": ("BertConfig", _BERT, "BertForMaskedLM", None, True, 1.0),
    "gpt2-untyped": ("GPT2Config", _GPT2, "GPT2LMHeadModel", None, False, 1.0),
    "t5-untyped": ("T5Config", _T5, "T5ForConditionalGeneration", None, False, 1.0),
}
ENCODER_DECODER = [name for name in MODELS if MODELS[name][3] == "SEQ_2_SEQ_LM"]
CAUSAL = [name for name in MODELS if MODELS[name][3] == "CAUSAL_LM"]


def stock(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """The model alone, in eval mode."""
    config, settings, model, *_ = MODELS[name]
    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def adapted(name: str, seed: int = 1, base=None, **config):
    """A model with one adapter whose B is not zero."""
    base = stock(name) if base is None else base
    settings = {"num_virtual_tokens": M, "r": R, "max_length": S, "task_type": MODELS[name][3]}
    model = get_peft_model(base, DePTConfig(**settings | config)).eval()
    fill(model, "default", seed)
    return model


def pair(name: str, **config):
    """Stock and adapted models with the same weights."""
    base = stock(name)
    return base, adapted(name, base=copy.deepcopy(base), **config)


def fill(model, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters(model, adapter):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def parameters(model, adapter: str = "default") -> list[torch.nn.Parameter]:
    """P, A, B."""
    layer = model.base_model.model.dept
    return [layer.dept_prompt[adapter], layer.dept_a[adapter], layer.dept_b[adapter]]


def inputs(b: int = 3, n: int = 8, padding: str = "right", seed: int = 2) -> dict[str, torch.Tensor]:
    """Random ids; the first row is full, the others are padded."""
    ids = torch.randint(4, VOCAB, (b, n), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for i in range(1, b):
        pads = 0 if padding == "none" else 2 * (i % 3)
        mask[i, slice(n - pads, None) if padding == "right" else slice(0, pads)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def targets(name: str, x: dict, seed: int = 3) -> dict[str, torch.Tensor]:
    """Labels of the task."""
    generator = torch.Generator().manual_seed(seed)
    b, n = x["input_ids"].shape
    kind = MODELS[name][2]
    if "ConditionalGeneration" in kind or "MTModel" in kind:
        return {"labels": torch.randint(4, VOCAB, (b, 6), generator=generator)}
    if "LMHead" in kind or "CausalLM" in kind or "MaskedLM" in kind:
        return {"labels": x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)}
    if "SequenceClassification" in kind:
        return {"labels": torch.randint(0, 2, (b,), generator=generator)}
    if "TokenClassification" in kind:
        return {"labels": torch.randint(0, 2, (b, n), generator=generator).masked_fill(x["attention_mask"] == 0, -100)}
    return {}


def widened(embeddings: torch.Tensor, prompt, a, b, after_first: bool, scale: float = 8 / R**0.5) -> torch.Tensor:
    """The official formula: the rows of P, then embedding plus ``scale * A @ B``."""
    n = embeddings.shape[1]
    tokens = embeddings + (scale * (a @ b))[:n].to(embeddings.dtype)
    rows = prompt.to(embeddings.dtype).expand(len(tokens), -1, -1)
    return insert(tokens, rows, after_first)


def insert(x: torch.Tensor, rows: torch.Tensor, after_first: bool) -> torch.Tensor:
    first = int(after_first)
    return torch.cat([x[:, :first], rows, x[:, first:]], 1)


def by_formula(name: str, model, p, x: dict, labels: dict | None = None, embeddings=None):
    """The output of a stock ``model`` for the formula's embeddings, still with the columns of the prompt."""
    _, _, kind, _, after_first, factor = MODELS[name]
    ids = x["input_ids"]
    m = p[0].shape[0]
    if embeddings is None:
        embeddings = factor * model.get_input_embeddings().weight[ids]
    wide = {
        "inputs_embeds": widened(embeddings, *p, after_first),
        "attention_mask": insert(x["attention_mask"], torch.ones(len(ids), m, dtype=torch.long), after_first),
    }
    labels = dict(labels or {})
    if "labels" in labels and labels["labels"].shape == ids.shape and ("LM" in kind or "Token" in kind):
        labels["labels"] = insert(labels["labels"], torch.full((len(ids), m), -100), after_first)
    return model(**wide, **labels)


def narrowed(name: str, value: torch.Tensor) -> torch.Tensor:
    """The output without the columns of the prompt."""
    first = int(MODELS[name][4])
    return torch.cat([value[:, :first], value[:, first + M :]], 1)
