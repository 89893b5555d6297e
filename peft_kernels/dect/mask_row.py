"""The hidden state and the logits at one position of every text, from a model's own forward pass."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops import label_logits
from ..peft_method import is_encoder_decoder


class MaskRow:
    """Runs a model as it is, but keeps of its last hidden state one row a text, and of its logits a few columns.

    The head sees that row alone. Where it ends in an ``nn.Linear`` over the vocabulary, that layer computes the label words alone;
    whether this gives what the whole layer gives is tried on the first text. Elsewhere columns are taken from the row's full logits.

    Args:
        model: a masked or causal language model, one of the T5 family, or, without ``label_ids``, an encoder.
        label_ids: (C, w) ids of the words of each class, -1: none. None: no scores.
        decoder_ids: what the decoder of an encoder-decoder model reads; its last position predicts the word.

    Raises:
        ValueError: scores are wanted of a model without a language model's head.
    """

    def __init__(self, model, label_ids: list[list[int]] | None = None, decoder_ids: list[int] | None = None):
        self.model, self.decoder_ids = model, decoder_ids
        self.base = model.get_decoder() if is_encoder_decoder(model) else model.base_model
        self.runs = model if label_ids is not None or is_encoder_decoder(model) else self.base
        self.options = {"use_cache": False} if "use_cache" in inspect.signature(self.runs.forward).parameters else {}
        self.takes_columns: bool | None = None  # not yet tried
        self.columns = self.places = None
        if label_ids is None:
            return
        if model.get_output_embeddings() is None:
            raise ValueError(f"DecT: {type(model).__name__} has no language model's head, so it gives no scores; label_words=None does without")
        ids = torch.tensor(label_ids)
        self.columns, places = ids[ids >= 0].unique(return_inverse=True)  # [M]
        self.places = torch.full_like(ids, -1).masked_scatter(ids >= 0, places)  # [C, w], in columns

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, S), (B, S) and (B,): hidden states (B, H) and, for every class, the largest logit of its words, (B, C); both float32."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **self.options}
        if self.decoder_ids is not None:
            inputs["decoder_input_ids"] = torch.tensor([self.decoder_ids], device=input_ids.device).expand(len(input_ids), -1)
            positions = torch.full_like(positions, len(self.decoder_ids) - 1)
        if self.columns is None:
            return self._run(inputs, positions)[0].float(), None
        self.columns, self.places = self.columns.to(input_ids.device), self.places.to(input_ids.device)
        if self.takes_columns is None:
            self._try_columns({k: v[:1] if isinstance(v, Tensor) else v for k, v in inputs.items()}, positions[:1])
        row, logits = self._run_for_columns(inputs, positions) if self.takes_columns else self._run(inputs, positions)
        words = logits if self.takes_columns else logits[:, self.columns]
        of_classes = words.float()[:, self.places.clamp_min(0)].masked_fill(self.places < 0, -torch.inf)  # [B, C, w]
        return row.float(), of_classes.amax(2)

    def _try_columns(self, inputs, positions):
        logits = self._run(inputs, positions)[1]
        layer = self.model.get_output_embeddings()
        self.takes_columns = type(layer) is nn.Linear and layer.out_features == logits.shape[-1]
        if self.takes_columns:
            columns, expected = self._run_for_columns(inputs, positions)[1].float(), logits[:, self.columns].float()
            tolerance = torch.finfo(logits.dtype).eps ** 0.5
            fits = columns.shape == expected.shape
            self.takes_columns = fits and bool((columns - expected).abs().max() <= tolerance * logits.abs().max())

    def _run(self, inputs, positions) -> tuple[Tensor, Tensor | None]:
        with _kept_rows(self.base, positions) as kept:
            output = self.runs(**inputs)
        logits = getattr(output, "logits", None)
        return kept[0], None if logits is None else logits[:, 0]

    def _run_for_columns(self, inputs, positions):
        with _label_columns(self.model.get_output_embeddings(), self.columns):
            return self._run(inputs, positions)


@contextmanager
def _kept_rows(base: nn.Module, positions: Tensor) -> Iterator[list[Tensor]]:
    """Of ``base``'s last hidden state (B, S, H) only the rows at ``positions`` go on, as (B, 1, H); they are listed as (B, H)."""
    kept = []

    def keep(module, arguments, output):
        hidden = output[0]
        if hidden.ndim != 3:
            raise ValueError(f"DecT: the last hidden state of {type(base).__name__} must be (B, S, H), got {tuple(hidden.shape)}")
        kept.append(hidden[torch.arange(len(hidden), device=hidden.device), positions])
        row = kept[0][:, None]
        if isinstance(output, tuple):
            return row, *output[1:]
        output[next(iter(output))] = row
        return output

    handle = base.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def _label_columns(layer: nn.Linear, columns: Tensor) -> Iterator[None]:
    """``layer`` computes the outputs of ``columns`` alone, in at least float32."""
    before = layer.__dict__.get("forward")

    def forward(hidden):  # [B, 1, E]
        return label_logits(hidden[:, 0], layer.weight, columns[:, None], bias=layer.bias)[:, None]

    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before
