"""What one forward adds to its special tokens, and the layers that add it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hf.call_state import CallState
from ..hf.class_swap import Swapped
from ..hf.peft_method import AdapterLayer
from ..ops import special_token_add, special_token_add_


@dataclass
class Injection:
    """Made before a forward, read by its layers, gone after it."""

    slots: Tensor  # [B, k]
    vectors: tuple[Tensor, ...]  # L of [P, d]; of [K, P, d] where rows differ in their adapter
    adapter_ids: Tensor | None  # [B]
    dropout: float
    seeds: tuple[Tensor, ...] | None  # L of []; None: no dropout
    shape: torch.Size  # of input_ids
    recorded: bool  # whether hidden states are part of the output
    in_place: bool
    passes: int = 0  # begun, where a layer takes several
    done: int = -1  # the pass whose vectors the fused end of the layer before it has added
    first: tuple[Tensor, Tensor] | None = None  # what the first layer got and what it was made of, if recorded

    def arguments(self, index: int, device: torch.device) -> dict:
        """For the operators; ``device``: that of the layer, of which there are several where a model is spread or replicated over them."""
        return {
            "vectors": self.vectors[index].to(device),
            "slots": self.slots.to(device),
            "dropout_p": self.dropout,
            "seed": None if self.seeds is None else self.seeds[index].to(device),
            "adapter_ids": None if self.adapter_ids is None else self.adapter_ids.to(device),
        }

    def ahead(self, index: int, device: torch.device) -> dict:
        """The same for who adds them before the pass begins, which then leaves its input as it is."""
        self.done = index
        return self.arguments(index, device)

    def added(self, hidden: Tensor, indices: tuple[int, ...]) -> Tensor:
        """``hidden`` (B, S, d), the input of a layer that takes the passes ``indices``, with its vectors."""
        index, self.passes = indices[0] if len(indices) == 1 else self.passes, self.passes + 1
        if index not in indices:
            raise RuntimeError(f"PASTA: pass {index} of a forward goes through another layer, got one that takes {indices}")
        if self.done == index:
            return hidden
        width = self.vectors[index].shape[-1]
        if hidden.ndim != 3 or hidden.shape[0] != self.shape[0] or hidden.shape[1] < self.shape[1] or hidden.shape[2] != width:
            raise ValueError(f"PASTA: layers must take hidden states {(*self.shape, width)}, got {tuple(hidden.shape)}")
        if self.in_place and not _is_shared(hidden):
            return special_token_add_(hidden, **self.arguments(index, hidden.device))
        result = special_token_add(hidden, **self.arguments(index, hidden.device))
        if self.recorded and index == 0:
            self.first = result, hidden
        return result

    def restored(self, output):
        """``output`` of the encoder: transformers records what the first layer takes, which stock models do not have anything added to."""
        if self.first is None or output is None:
            return output
        taken, stock = self.first
        if hasattr(output, "items"):
            if output.get("hidden_states") is not None:
                output["hidden_states"] = tuple(stock if h is taken else h for h in output["hidden_states"])
            return output
        return tuple(tuple(stock if h is taken else h for h in x) if isinstance(x, tuple) else x for x in output)


def _is_shared(hidden: Tensor) -> bool:
    """Whether others may hold ``hidden``'s memory: a base, or a leaf that waits for its gradient."""
    return hidden._base is not None or (hidden.is_leaf and hidden.requires_grad)


class State:
    """Where the layers of a model find the injection of the forward at hand, each thread its own."""

    def __init__(self, adapters: AdapterLayer):
        self.adapters = adapters
        self.call = CallState()  # within a forward its Injection, or False where there is nothing to add

    def injection(self) -> Injection | None:
        """Raises where a layer without an injection should have one."""
        injection = self.call.get()
        if injection is None and self.adapters.is_active():
            raise RuntimeError(
                "PASTA: a layer runs outside of its encoder's forward, where nobody knows what to add; checkpointing other than"
                " gradient_checkpointing_enable() does that in the backward pass"
            )
        return injection or None


class InjectingLayer(Swapped):
    """Comes before the layer's own class.

    It adds in ``__call__``, outside of gradient checkpointing, which transformers wraps around ``__call__`` (5.17) or ``forward`` (5.23):
    a layer that runs again in the backward pass gets the input that it had, whatever forward was last.
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
