"""Dropout of the vectors added to special tokens: a counter-based draw for every row of the batch and every occurrence.

Element ``column`` of the vector for slot ``slot`` of row ``row`` is kept if the first word of Philox4x32-10 (Salmon et
al., SC 2011) with the key (low, high half of seed) and the counter (column, slot, row, 0) is at least ``threshold(p)``;
kept elements are multiplied by 1 / (1 - p). No mask is stored: backward draws the same numbers again, and all
implementations draw the same numbers.
"""

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    return min(round(p * 2**32), _LOW)


def draw_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Returns the seed as (1,) int64 on ``device``; for None, draws one from torch's generator of the device."""
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def factors(p: float, seed: Tensor, batch: int, slots: int, width: int) -> Tensor:
    """Returns the dropout factors, (batch, slots, width) float32: 0 or 1 / (1 - p)."""
    rows, occurrences, columns = (torch.arange(n, device=seed.device) for n in (batch, slots, width))
    c0 = columns.expand(batch, slots, -1)
    c1 = occurrences[:, None].expand(batch, -1, width)
    c2 = rows[:, None, None].expand(-1, slots, width)
    kept = philox(seed, c0, c1, c2) >= threshold(p)
    return kept.to(torch.float32) * (1 / (1 - p))


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Returns the first word of Philox4x32-10. Words are 32 bits wide, stored in int64."""
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(_ROUNDS):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps at 64 bits; no bit is lost
        c0, c1, c2, c3 = (b >> 32 & _LOW) ^ c1 ^ k0, b & _LOW, (a >> 32 & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = k0 + _KEY_STEPS[0] & _LOW, k1 + _KEY_STEPS[1] & _LOW
    return c0
