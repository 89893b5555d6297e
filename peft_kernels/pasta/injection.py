"""The vectors that one forward adds to its special tokens, and the layers that add them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hf.call_state import CallState
from ..hf.class_swap import Swapped
from ..hf.peft_method import AdapterLayer
from ..ops import special_token_add, special_token_add_


@dataclass
class Injection:
    """The vectors and special tokens of one forward: made before it, read by its layers, dropped after it."""

    slots: Tensor  # [B, k]
    vectors: tuple[Tensor, ...]  # L tensors [P, d], or [K, P, d] where rows have different adapters
    adapter_ids: Tensor | None  # [B]
    dropout: float
    seeds: tuple[Tensor, ...] | None  # L scalar tensors; None: no dropout
    shape: torch.Size  # of input_ids
    recorded: bool  # whether hidden states are part of the output
    in_place: bool
    passes: int = 0  # passes begun, for layers that take several
    fused_pass: int = -1  # the pass whose vectors the previous layer's fused end has added
    first: tuple[Tensor, Tensor] | None = None  # the first layer's input with and without its vectors, if recorded

    def arguments(self, index: int, device: torch.device) -> dict:
        """The operators' arguments, on the layer's ``device``: a model may be spread or replicated over several."""
        return {
            "vectors": self.vectors[index].to(device),
            "slots": self.slots.to(device),
            "dropout_p": self.dropout,
            "seed": None if self.seeds is None else self.seeds[index].to(device),
            "adapter_ids": None if self.adapter_ids is None else self.adapter_ids.to(device),
        }

    def ahead(self, index: int, device: torch.device) -> dict:
        """``arguments`` for a caller that adds the vectors before the pass, which then leaves its input unchanged."""
        self.fused_pass = index
        return self.arguments(index, device)

    def added(self, hidden: Tensor, indices: tuple[int, ...]) -> Tensor:
        """``hidden`` (B, S, d) with the vectors added, for a layer that takes the passes ``indices``."""
        index, self.passes = indices[0] if len(indices) == 1 else self.passes, self.passes + 1
        if index not in indices:
            raise RuntimeError(
                f"PASTA: pass {index} of a forward goes through another layer, got one that takes {indices}"
            )
        if self.fused_pass == index:
            return hidden
        width = self.vectors[index].shape[-1]
        if (
            hidden.ndim != 3
            or hidden.shape[0] != self.shape[0]
            or hidden.shape[1] < self.shape[1]
            or hidden.shape[2] != width
        ):
            raise ValueError(f"PASTA: layers must take hidden states {(*self.shape, width)}, got {tuple(hidden.shape)}")
        if self.in_place and not _is_shared(hidden):
            return special_token_add_(hidden, **self.arguments(index, hidden.device))
        result = special_token_add(hidden, **self.arguments(index, hidden.device))
        if self.recorded and index == 0:
            self.first = result, hidden
        return result

    def restored(self, output):
        """``output`` of the encoder with the first recorded hidden state without the vectors, as in the stock model."""
        if self.first is None or output is None:
            return output
        changed, stock = self.first
        if hasattr(output, "items"):
            if output.get("hidden_states") is not None:
                output["hidden_states"] = tuple(stock if h is changed else h for h in output["hidden_states"])
            return output
        return tuple(tuple(stock if h is changed else h for h in x) if isinstance(x, tuple) else x for x in output)


def _is_shared(hidden: Tensor) -> bool:
    """Whether ``hidden`` may share its memory: it is a view, or a leaf that requires a gradient."""
    return hidden._base is not None or (hidden.is_leaf and hidden.requires_grad)


class State:
    """Holds the injection of the current forward for the layers of a model, one per thread."""

    def __init__(self, adapters: AdapterLayer):
        self.adapters = adapters
        self.call = CallState()  # within a forward: its Injection, or False if there is nothing to add

    def injection(self) -> Injection | None:
        """The injection of the current forward, or None.

        Raises:
            RuntimeError: an adapter is active and no forward of the encoder is running.
        """
        injection = self.call.get()
        if injection is None and self.adapters.is_active():
            raise RuntimeError(
                "PASTA: a layer runs outside of its encoder's forward, where the special tokens are unknown;"
                " checkpointing other than gradient_checkpointing_enable() does that in the backward pass"
            )
        return injection or None


class InjectingLayer(Swapped):
    """The mixin that is put in front of a layer's own class.

    It adds in ``__call__``, outside of gradient checkpointing, which transformers wraps around ``__call__`` (5.17) or
    ``forward`` (5.23): a layer that runs again in the backward pass gets its original input, whichever forward ran
    last.
    """

    pasta_state: State
    pasta_indices: tuple[int, ...]

    def __call__(self, hidden_states, *args, **kwargs):
        injection = self.pasta_state.injection()
        if injection is not None:
            hidden_states = injection.added(hidden_states, self.pasta_indices)
        return super().__call__(hidden_states, *args, **kwargs)


def indices_of(passes: list[nn.Module]) -> dict[nn.Module, tuple[int, ...]]:
    return {layer: tuple(i for i, other in enumerate(passes) if other is layer) for layer in passes}
