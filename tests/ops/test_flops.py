"""``FlopCounterMode`` counts the same matmuls for our operators as for the formula in plain PyTorch."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels import ops


def flops(function, *leaves):
    """Operations of a forward, and of a backward for all ``leaves``."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    with FlopCounterMode(display=False) as forward:
        out = function(*leaves)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def matmuls(query, key, value):
    return (query @ key.mT).softmax(-1) @ value


def test_shared_cross_attention():
    query, key, value = torch.randn(3, 2, 8, 16), torch.randn(3, 2, 7, 16), torch.randn(3, 2, 7, 16)
    forward, backward = flops(ops.shared_cross_attention, query, key, value)
    plain = flops(matmuls, query, key, value)
    assert forward == plain[0]
    assert backward == plain[1] + forward // 2  # recomputes the scores
    shared = flops(ops.shared_cross_attention, query.repeat_interleave(4, 0), key, value)
    assert shared == (4 * forward, 4 * backward)
    frozen = flops(lambda q: ops.shared_cross_attention(q, key, value), query)
    assert frozen == (forward, 3 * forward // 2)  # recomputes the scores; dP and dQ


def test_label_logits():
    hidden, weight, ids = torch.randn(5, 24), torch.randn(9, 24), torch.tensor([[4, 1], [2, 0]])
    forward, backward = flops(lambda hidden: ops.label_logits(hidden, weight, ids), hidden)
    assert (forward, backward) == flops(lambda hidden: hidden @ weight[ids.flatten()].mT, hidden)


def test_decomposed_prompt_embedding():
    ids, weight = torch.randint(0, 9, (3, 7)), torch.randn(9, 16)
    prompt, a, b = torch.randn(4, 16), torch.randn(7, 2), torch.randn(2, 16)
    got = flops(lambda a, b: ops.decomposed_prompt_embedding(ids, weight, prompt, a, b), a, b)
    assert got == flops(lambda a, b: a @ b, a, b)


def test_label_cross_attention():
    slots, features = torch.randn(2, 32), torch.randn(3, 40, 32)
    weights = [torch.randn(32, 32) for _ in range(3)]

    def absorbed(slots, w_q, w_k, w_v):  # both heads in one: a block of the weights for each
        q, k, v = ((slots @ w_q.mT).view(2, 2, 16).transpose(0, 1), w_k.view(2, 16, 32), w_v.view(2, 16, 32))
        pooled = (torch.bmm(q, k).flatten(0, 1) @ features.mT).softmax(-1) @ features  # [B, H * S, d]
        return torch.bmm(pooled.view(3, 2, 2, 32).transpose(0, 1).flatten(1, 2), v.mT)

    got = flops(lambda *x: ops.label_cross_attention(x[0], features, *x[1:], num_heads=2), slots, *weights)
    assert got[0] == flops(absorbed, slots, *weights)[0]
    assert got[1] > 0


@pytest.mark.parametrize("order", ["peft_kernels, torch.utils.flop_counter", "torch.utils.flop_counter, peft_kernels"])
def test_registered_whatever_is_imported_first(order):
    code = (
        f"import {order}; import torch, torch.utils.flop_counter as f; assert torch.ops.peft_kernels.label_logits in"
        " f.flop_registry"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)
