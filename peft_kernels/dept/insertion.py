"""Insertion of prompt columns into a model's inputs, and their removal from its outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Insertion:
    virtual: int  # m
    length: int  # L
    after_first: bool  # whether the operator writes the prompt behind the first token
    used: Tensor | None = None  # [B] whether a row has an adapter; None: all have
    rotation: Tensor | None = None  # [B] padding columns that move from the front to the end
    lead: Tensor | None = None  # [B] columns in front of the prompt; None: the operator's layout

    def widen(self, x: Tensor, fill: int) -> Tensor:
        """Widen (B, L) to (B, m + L) with ``fill`` in the prompt's columns."""
        return self._inserted(x, x.new_full((x.shape[0], self.virtual), fill))

    def widen_mask(self, mask: Tensor) -> Tensor:
        """Like ``widen``; the prompt of a row without an adapter is masked."""
        seen = mask.new_ones(mask.shape[0], self.virtual)
        return self._inserted(mask, seen if self.used is None else seen * self.used[:, None].to(seen.dtype))

    def widen_positions(self, positions: Tensor, first_position: int) -> Tensor:
        """Insert the prompt's positions and shift those of the tokens behind it."""
        first = int(self.after_first)
        batch = positions.shape[0] if self.used is None else self.used.shape[0]
        positions = positions.expand(batch, -1)
        behind = torch.arange(self.length, device=positions.device) >= (
            first if self.lead is None else self.lead[:, None]
        )
        prompt = torch.arange(self.virtual, device=positions.device, dtype=positions.dtype) + first_position + first
        return self._inserted(torch.where(behind, self.shift(positions), positions), prompt.expand(batch, -1))

    def shift(self, positions: Tensor) -> Tensor:
        """Positions of tokens behind the prompt, moved by its length."""
        return positions + (
            self.virtual if self.used is None else self.virtual * self.used[:, None].to(positions.dtype)
        )

    def rotate(self, x: Tensor) -> Tensor:
        """``x`` (B, L, ...) with leading padding moved to the end."""
        return x if self.rotation is None else _gather(x, (self._tokens(x) + self.rotation[:, None]) % self.length)

    def arrange(self, x: Tensor) -> Tensor:
        """Reorder (B, m + L, ...) from the operator's layout to the model's."""
        if self.lead is None:
            return x
        first, lead = int(self.after_first), self.lead[:, None]
        columns = torch.arange(self.virtual + self.length, device=x.device)
        # a token's column in the operator's layout
        written = torch.where(columns < first, columns, columns + self.virtual)
        return _gather(
            x,
            torch.where(
                columns < lead, written, torch.where(columns < lead + self.virtual, first + columns - lead, columns)
            ),
        )

    def kept(self, keep: int | Tensor) -> int | Tensor:
        """``logits_to_keep``, a number of last tokens (0: all) or a tensor of columns, counted with the prompt's
        columns.
        """
        if isinstance(keep, Tensor):
            if self.lead is not None or self.after_first:
                raise ValueError(
                    "DePT: logits_to_keep must be a number where the prompt does not come first in every row, got a"
                    " tensor of columns"
                )
            return torch.where(keep < 0, keep, keep + self.virtual)
        return 0 if keep >= self.length - int(self.after_first) else keep

    def narrow(self, value):
        """Remove the prompt's columns and restore the user's order, in per-token tensors (B, m + L, d), also inside
        tuples.
        """
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
        return (
            value
            if self.rotation is None
            else _gather(value, (self._tokens(value) - self.rotation[:, None]) % self.length)
        )

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
