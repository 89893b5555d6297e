"""Shared code of the CPU library implementations: streams become query rows, and inputs of one shape one batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import as_token_major, fold, token_major, unfold


class Group(NamedTuple):
    """Consecutive inputs with equally many streams and equally many keys."""

    streams: slice
    inputs: slice
    length: int


def unavailable(device: str) -> str | None:
    return None if device == "cpu" else f"it reads lengths on the host and is for the CPU; use 'triton' on {device}"


def groups(query: Tensor, key: Tensor, key_lengths: Tensor | None, encoder_index: Tensor | None) -> list[Group]:
    """Returns groups that cover every stream once, in order; inputs without streams are left out."""
    inputs, n = key.shape[0], key.shape[2]
    if encoder_index is None:
        streams = [query.shape[0] // max(inputs, 1)] * inputs
    else:
        streams = torch.bincount(encoder_index, minlength=inputs).tolist()
    lengths = [n] * inputs if key_lengths is None else key_lengths.tolist()
    result, u, i = [], 0, 0
    while i < inputs:
        j = i + 1
        while j < inputs and (streams[j], lengths[j]) == (streams[i], lengths[i]):
            j += 1
        v = u + (j - i) * streams[i]
        if v > u:
            result.append(Group(slice(u, v), slice(i, j), lengths[i]))
        u, i = v, j
    return result


def forward(attend, query, key, value, key_lengths, encoder_index, scale, need_lse) -> tuple[Tensor, Tensor | None]:
    """Run ``attend(query, key, value, scale, need_lse) -> out, lse`` on every group."""
    streams, heads, tokens, _ = query.shape
    # without groups and slices, which cost microseconds
    if key_lengths is None and encoder_index is None and query.numel() and key.numel():
        out, lse = attend(fold(query, key.shape[0]), key, value, scale, need_lse)
        return unfold(out, tokens), unfold(lse, tokens) if need_lse else None
    out = token_major(*query.shape, like=query)
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = token_major(streams, heads, tokens, like=query, dtype=wide) if need_lse else None
    for group in groups(query, key, key_lengths, encoder_index) if query.numel() else ():
        if group.length:
            group_out, group_lse = attend(_rows(query, group), *_keys(key, value, group), scale, need_lse)
            out[group.streams] = unfold(group_out, tokens)
            if need_lse:
                lse[group.streams] = unfold(group_lse, tokens)
        else:
            out[group.streams] = 0
            if need_lse:
                lse[group.streams] = float("-inf")
    return out, lse


def backward(
    attend_backward, grad_out, grad_lse, query, key, value, out, lse, key_lengths, encoder_index, scale, *needs
):
    """Run ``attend_backward(grad_out, grad_lse, query, key, value, out, lse, scale, needs)`` on every group.

    It returns dq, dk and dv of the group.
    """
    tokens = query.shape[2]
    plan = groups(query, key, key_lengths, encoder_index) if query.numel() else []

    def gradients(group):
        rows = [None if x is None else _rows(x, group) for x in (grad_out, grad_lse, query, out, lse)]
        return attend_backward(*rows[:3], *_keys(key, value, group), *rows[3:], scale, needs)

    if len(plan) == 1 and plan[0].inputs == slice(0, key.shape[0]) and plan[0].length == key.shape[2] > 0:
        grad_query, grad_key, grad_value = gradients(plan[0])
        keys = (None if x is None else as_token_major(x) for x in (grad_key, grad_value))
        return unfold(grad_query, tokens) if needs[0] else None, *keys
    grads = [token_major(*x.shape, like=x) if needed else None for x, needed in zip((query, key, value), needs)]
    stop = 0  # of the previous group; the inputs from here to the next group have no streams
    for group in plan:
        grad_query, *group_grads = gradients(group) if group.length else (0, 0, 0)
        if needs[0]:
            grads[0][group.streams] = unfold(grad_query, tokens) if group.length else 0
        for grad, group_grad in zip(grads[1:], group_grads):
            if grad is not None:
                grad[stop : group.inputs.start] = 0
                grad[group.inputs, :, : group.length] = group_grad
                grad[group.inputs, :, group.length :] = 0
        stop = group.inputs.stop
    for grad in grads[1:]:
        if grad is not None:
            grad[stop:] = 0
    return tuple(grads)


def _rows(x, group):
    return fold(x[group.streams], group.inputs.stop - group.inputs.start)


def _keys(key, value, group):
    return key[group.inputs, :, : group.length], value[group.inputs, :, : group.length]
