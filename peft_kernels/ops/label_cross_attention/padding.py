"""Conversion between ragged rows and zero-padded rows, which library functions take."""

import torch

__all__ = ["padded", "unpadded"]


def padded(x, lengths, offsets):
    """Returns ``x``, (B, n, ...) or with offsets (total, ...), as (B, n, ...) padded with 0, and its mask.

    The mask, (B, n), is true at valid positions; None: all are valid.
    """
    if offsets is None and lengths is None:
        return x, None
    if offsets is None:
        mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return x.masked_fill(~mask[..., None], 0), mask
    lengths = offsets.diff()
    longest = int(lengths.max()) if lengths.numel() else 0  # synchronizes on a GPU
    mask = torch.arange(longest, device=x.device) < lengths[:, None]
    out = x.new_zeros(*mask.shape, *x.shape[1:])
    out[mask] = x
    return out, mask


def unpadded(x, mask, offsets):
    """Returns a padded result, (B, n, ...), in the layout of the input."""
    return x if offsets is None else x[mask]
