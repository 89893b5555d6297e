"""Insertion of prompt columns into a model's inputs, and their removal from its outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Insertion:
    """The columns of the prompt in the inputs of one batch."""

    virtual: int  # m
    length: int  # L
    after_first: bool  # whether the operator writes the prompt behind the first token
    has_adapter: Tensor | None = None  # [B] whether a row has an adapter; None: all have
    rotation: Tensor | None = None  # [B] padding columns that move from the front to the end
    lead: Tensor | None = None  # [B] columns in front of the prompt; None: the operator's layout

    def widen(self, x: Tensor, fill: int) -> Tensor:
        """Widen (B, L) to (B, m + L) with ``fill`` in the prompt's columns."""
        return self._inserted(x, x.new_full((x.shape[0], self.virtual), fill))

    def widen_mask(self, mask: Tensor) -> Tensor:
        """Like ``widen``; the prompt of a row without an adapter is masked."""
        prompt = mask.new_ones(mask.shape[0], self.virtual)
        if self.has_adapter is not None:
            prompt = prompt * self.has_adapter[:, None].to(prompt.dtype)
        return self._inserted(mask, prompt)

    def widen_positions(self, positions: Tensor, first_position: int) -> Tensor:
        """Insert the prompt's positions and shift the positions of the tokens behind it."""
        first = int(self.after_first)
        batch = positions.shape[0] if self.has_adapter is None else self.has_adapter.shape[0]
        positions = positions.expand(batch, -1)
        behind = self._tokens(positions) >= (first if self.lead is None else self.lead[:, None])
        prompt = torch.arange(self.virtual, device=positions.device, dtype=positions.dtype) + first_position + first
        return self._inserted(torch.where(behind, self.shift(positions), positions), prompt.expand(batch, -1))

    def shift(self, positions: Tensor) -> Tensor:
        """Positions of tokens behind the prompt, moved by its length."""
        if self.has_adapter is None:
            return positions + self.virtual
        return positions + self.virtual * self.has_adapter[:, None].to(positions.dtype)

    def rotate(self, x: Tensor) -> Tensor:
        """``x`` (B, L, ...) with leading padding moved to the end."""
        return x if self.rotation is None else _gather(x, (self._tokens(x) + self.rotation[:, None]) % self.length)

    def arrange(self, x: Tensor) -> Tensor:
        """Reorder (B, m + L, ...) from the operator's layout to the model's."""
        if self.lead is None:
            return x
        first, lead = int(self.after_first), self.lead[:, None]
        columns = torch.arange(self.virtual + self.length, device=x.device)
        # columns in the operator's layout: of a token, and of the prompt from lead on
        token = torch.where(columns < first, columns, columns + self.virtual)
        behind_lead = torch.where(columns < lead + self.virtual, first + columns - lead, columns)
        return _gather(x, torch.where(columns < lead, token, behind_lead))

    def kept_logits(self, keep: int | Tensor) -> int | Tensor:
        """``logits_to_keep``, a number of last tokens (0: all) or a tensor of columns, counted with the prompt's."""
        if isinstance(keep, Tensor):
            if self.lead is not None or self.after_first:
                raise ValueError(
                    "DePT: logits_to_keep must be a number where the prompt does not come first in every row, got a"
                    " tensor of columns"
                )
            return torch.where(keep < 0, keep, keep + self.virtual)
        return 0 if keep >= self.length - int(self.after_first) else keep

    def narrow(self, value):
        """Remove the prompt's columns from tensors (B, m + L, d), also in tuples, and restore the order of tokens."""
        if type(value) is tuple:
            return tuple(self.narrow(x) for x in value)
        if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[1] != self.virtual + self.length:
            return value
        if self.lead is not None:
            tokens = self._tokens(value)
            value = _gather(value, torch.where(tokens < self.lead[:, None], tokens, tokens + self.virtual))
        elif self.after_first:
            value = torch.cat([value[:, :1], value[:, 1 + self.virtual :]], 1)
        else:
            value = value[:, self.virtual :]
        if self.rotation is None:
            return value
        return _gather(value, (self._tokens(value) - self.rotation[:, None]) % self.length)

    def _inserted(self, x, rows):
        x, first = self.rotate(x), int(self.after_first)
        return self.arrange(torch.cat([x[:, :first], rows, x[:, first:]], 1))

    def _tokens(self, x):
        return torch.arange(self.length, device=x.device)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b, j]]``."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def leading_padding(mask: Tensor) -> Tensor:
    """The number of columns before the first token, (B,)."""
    return (mask.cumsum(1) == 0).sum(1)


def positions_of(mask: Tensor, first_position: int = 0) -> Tensor:
    """The position of every column, counting unmasked columns."""
    return (mask.long().cumsum(1) - 1).clamp_min(0) + first_position
