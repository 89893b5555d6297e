"""Models to profile: a checkpoint, or an architecture at full size with random weights, which needs no network."""

from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ...dept.family import max_columns
from ..pid_baselines import sharpened
from ..results import first_line
from ..workloads import VOCAB_SIZE

_T5 = {"vocab_size": VOCAB_SIZE, "decoder_start_token_id": 0}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "t5-small": T5Config(**_T5),
    "t5-base": T5Config(**_T5, d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "t5-large": T5Config(**_T5, d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    "bert-base": BertConfig(),
    "bert-large": BertConfig(**_LARGE),
    "roberta-base": RobertaConfig(**_ROBERTA),
    "roberta-large": RobertaConfig(**_ROBERTA, **_LARGE),
    "distilbert-base": DistilBertConfig(),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
}
LANGUAGE_MODELS = {
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "causal": AutoModelForCausalLM,
    "encoder": AutoModelForMaskedLM,
}
NAMES = {"encoder-decoder": "an encoder-decoder model", "causal": "a causal model", "encoder": "an encoder"}


@dataclass(frozen=True)
class Source:
    """Loads models; every call returns a new one, in eval mode, with the same weights."""

    name: str
    config: PreTrainedConfig
    random: bool
    dtype: torch.dtype
    device: str

    def __str__(self):
        return f"{self.name}, {NAMES[self.kind]}"

    @property
    def title(self) -> str:
        if self.random:
            return f"{self.name}, random weights"
        return Path(self.name).name if Path(self.name).exists() else self.name

    @property
    def kind(self) -> str:
        """A key of ``LANGUAGE_MODELS``."""
        if self.config.is_encoder_decoder:
            return "encoder-decoder"
        masked = self.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
            self.config, "is_decoder", False
        )
        return "causal" if self.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not masked else "encoder"

    def language_model(self) -> nn.Module:
        return self._load(LANGUAGE_MODELS[self.kind])

    def classifier(self) -> nn.Module:
        """The model with a head for two classes."""
        return self._load(AutoModelForSequenceClassification, num_labels=2, ignore_mismatched_sizes=True)

    def _load(self, auto, **options) -> nn.Module:
        torch.manual_seed(0)  # the head may be newly initialised
        if self.random:
            model = auto.from_config(self.config)
            if isinstance(model, T5ForConditionalGeneration):
                sharpened(model)
        else:
            try:
                model = auto.from_pretrained(self.name, **options)
            except Exception as error:  # each weight format raises its own
                raise ValueError(f"{self.name} cannot be loaded: {first_line(error)}") from error
        return model.to(self.device, self.dtype).eval()


def source_of(name: str, dtype: torch.dtype, device: str) -> Source:
    """Make a source. ``name`` is a folder, otherwise one of ``ARCHITECTURES``, otherwise a hub id.

    Raises:
        OSError, ValueError: transformers cannot read anything of that name.
    """
    if name in ARCHITECTURES and not Path(name).exists():
        return Source(name, ARCHITECTURES[name], True, dtype, device)
    return Source(name, AutoConfig.from_pretrained(name), False, dtype, device)


def check_length(encoder: nn.Module, length: int, prompt_rows: int = 0) -> None:
    """Check that the model has enough positions.

    Raises:
        typer.BadParameter: the position table, if there is one, has fewer rows.
    """
    limit = max_columns(encoder)
    if limit is not None and length + prompt_rows > limit:
        prompt = f" and a prompt of {prompt_rows} rows" if prompt_rows else ""
        raise typer.BadParameter(f"the model has {limit} positions, got {length} tokens{prompt}", param_hint="--length")
