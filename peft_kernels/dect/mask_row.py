"""The hidden state and the logits at one position of every text, from a model's own forward pass."""

import inspect
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..hf.call_state import CallState
from ..hf.peft_method import is_encoder_decoder
from ..ops import label_logits


@dataclass(eq=False)
class _Call:
    """State of one forward."""

    positions: Tensor  # [B], the mask of each text
    length: int  # of the sequence
    rows: list[Tensor] = field(default_factory=list)  # the hidden states there, [B, H], once per run of the base


class MaskRow:
    """Runs an unchanged model, but keeps one row per text of its last hidden state and a few columns of its logits.

    The head sees only that row. If it ends in an ``nn.Linear`` over the vocabulary, that layer computes only the label
    words; on the first text the result is compared with that of the whole layer. Otherwise columns are taken from the
    row's full logits.

    Args:
        model: a masked or causal language model, one of the T5 family, or, without ``label_ids``, an encoder.
        label_ids: (C, w) ids of the words of each class, -1: none. None: no scores.
        decoder_ids: input ids of an encoder-decoder model's decoder, which predicts the word at its last position.

    Raises:
        ValueError: ``label_ids`` are given, but the model has no language model head.
    """

    def __init__(self, model, label_ids: list[list[int]] | None = None, decoder_ids: list[int] | None = None):
        self.model, self.decoder_ids = model, decoder_ids
        self.base = model.get_decoder() if is_encoder_decoder(model) else model.base_model
        self.module = model if label_ids is not None or is_encoder_decoder(model) else self.base
        self.options = {"use_cache": False} if "use_cache" in inspect.signature(self.module.forward).parameters else {}
        self.takes_columns: bool | None = None  # None: not tried yet
        self.call = CallState()
        self.columns = self.word_columns = None
        if label_ids is None:
            return
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"DecT: {type(model).__name__} has no language model head, so label_words must be None: there are no"
                " scores"
            )
        ids = torch.tensor(label_ids)
        self.columns, indices = ids[ids >= 0].unique(return_inverse=True)  # [M]
        self.word_columns = torch.full_like(ids, -1).masked_scatter(ids >= 0, indices)  # [C, w], indices into columns

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, H) and, for every class, the largest logit of its words, (B, C), both float32.

        ``input_ids`` and ``attention_mask`` are (B, S), ``positions`` (B,).
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **self.options}
        if self.decoder_ids is not None:
            ids = torch.tensor([self.decoder_ids], device=input_ids.device)
            inputs["decoder_input_ids"] = ids.expand(len(input_ids), -1)
            positions = torch.full_like(positions, len(self.decoder_ids) - 1)
        if self.columns is None:
            return self._run(inputs, positions)[0].float(), None
        columns, word_columns = self.columns.to(input_ids.device), self.word_columns.to(input_ids.device)
        if self.takes_columns is None:
            first = {k: v[:1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            self.takes_columns = self._try_columns(first, positions[:1], columns)
        if self.takes_columns:
            row, words = self._run_for_columns(inputs, positions, columns)
        else:
            row, logits = self._run(inputs, positions)
            words = logits[:, columns]
        words = words.float()[:, word_columns.clamp_min(0)].masked_fill(word_columns < 0, -torch.inf)  # [B, C, w]
        return row.float(), words.amax(2)

    def _try_columns(self, inputs, positions, columns) -> bool:
        logits = self._run(inputs, positions)[1]
        if logits is None:
            raise ValueError(
                f"DecT: the output of {type(self.model).__name__} has no logits, so label_words must be None: there are"
                " no scores"
            )
        layer = self.model.get_output_embeddings()
        is_plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter  # no quantised weight, no adapter
        if not is_plain or layer.out_features != logits.shape[-1]:
            return False
        words, expected = self._run_for_columns(inputs, positions, columns)[1].float(), logits[:, columns].float()
        tolerance = torch.finfo(logits.dtype).eps ** 0.5
        return words.shape == expected.shape and bool((words - expected).abs().max() <= tolerance * logits.abs().max())

    def _run(self, inputs, positions) -> tuple[Tensor, Tensor | None]:
        call = _Call(positions, inputs["input_ids" if self.decoder_ids is None else "decoder_input_ids"].shape[1])
        # the hook leaves forwards of other threads unchanged
        handle = self.base.register_forward_hook(partial(self._keep, call))
        self.call.set(call)
        try:
            output = self.module(**inputs)
        finally:
            self.call.set(None)
            handle.remove()
        if len(call.rows) != 1:
            raise ValueError(
                f"DecT: {type(self.base).__name__} must run once in a forward of {type(self.module).__name__}, but its"
                f" hooks ran {len(call.rows)} times: pass the model as it was before torch.compile"
            )
        logits = getattr(output, "logits", None)
        return call.rows[0], None if logits is None else logits[:, 0]

    def _run_for_columns(self, inputs, positions, columns):
        with _LabelColumns(self.model.get_output_embeddings(), columns):
            return self._run(inputs, positions)

    def _keep(self, call, module, arguments, output):
        """Reduce the last hidden state (B, S, H) of ``base`` to the rows at the positions, (B, 1, H)."""
        if self.call.get() is not call:
            return None
        hidden = output[0]
        if hidden.ndim != 3:
            raise ValueError(
                f"DecT: the last hidden state of {type(module).__name__} must be (B, S, H), got {tuple(hidden.shape)}"
            )
        if hidden.shape[1] != call.length:
            raise ValueError(
                f"DecT: the last hidden state of {type(module).__name__} must have {call.length} rows, one for each"
                f" token, got {hidden.shape[1]}: an adapter that adds tokens moves the mask"
            )
        call.rows.append(hidden[torch.arange(len(hidden), device=hidden.device), call.positions.to(hidden.device)])
        row = call.rows[-1][:, None]
        if isinstance(output, tuple):
            return row, *output[1:]
        output[next(iter(output))] = row
        return output


class _LabelColumns(TorchFunctionMode):
    """Makes the unchanged ``layer`` compute only the outputs ``columns``, in at least float32, in this thread."""

    def __init__(self, layer: nn.Linear, columns: Tensor):
        super().__init__()
        self.layer, self.columns = layer, columns

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear and len(args) > 1 and args[1] is self.layer.weight:
            hidden, weight, *bias = args  # [B, 1, E]
            columns = self.columns[:, None].to(weight.device)
            return label_logits(hidden[:, 0].to(weight.dtype), weight, columns, bias=bias[0] if bias else None)[:, None]
        return function(*args, **(kwargs or {}))
