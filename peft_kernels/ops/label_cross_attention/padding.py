"""Rows of different length as the library takes them: padded, the padding 0."""

import torch

__all__ = ["padded", "unpadded"]


def padded(x, lengths, offsets):
    """``x``, (B, n, ...) or with offsets (total, ...), as (B, n, ...) with padding of 0; and which of it is no padding, or None for all."""
    if offsets is None and lengths is None:
        return x, None
    if offsets is None:
        mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return x.masked_fill(~mask[..., None], 0), mask
    lengths = offsets.diff()
    longest = int(lengths.max()) if lengths.numel() else 0  # waits for a GPU
    mask = torch.arange(longest, device=x.device) < lengths[:, None]
    out = x.new_zeros(*mask.shape, *x.shape[1:])
    out[mask] = x
    return out, mask


def unpadded(x, mask, offsets):
    """The other way for what was computed, (B, n, ...)."""
    return x if offsets is None else x[mask]
