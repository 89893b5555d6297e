"""The growing cache layer holds the same as the stock layer after the same operations."""

import torch
from transformers.cache_utils import DynamicLayer

from peft_kernels.pid.cache import GrowingLayer


def test_growing_layer_is_the_stock_layer():
    torch.manual_seed(0)
    ours, stock = GrowingLayer(), DynamicLayer()
    moves = [
        torch.nn.Identity(),
        lambda x: x.batch_select_indices(torch.tensor([2, 0])),
        lambda x: x.crop(-3),
        lambda x: x.batch_repeat_interleave(2),
    ]
    for step, tokens in enumerate([7, 1, 1, 70, 1, 1, 5, 1, 130, 1, 1]):
        rows = 4 if step == 0 else stock.keys.shape[0]
        new = torch.randn(2, rows, 3, tokens, 8)
        for held, truth in zip(ours.update(*new), stock.update(*new)):
            assert torch.equal(held, truth)
        for layer in (ours, stock):
            moves[step % len(moves) if rows > 2 or step % 4 != 1 else 0](layer)
        assert torch.equal(ours.keys, stock.keys) and torch.equal(ours.values, stock.values)
        assert ours.get_seq_length() == stock.get_seq_length()


def test_a_token_is_written_in_place():
    layer = GrowingLayer()
    layer.update(*torch.randn(2, 2, 3, 9, 8))
    before = layer.keys.data_ptr()
    for _ in range(layer.spare_tokens):
        layer.update(*torch.randn(2, 2, 3, 1, 8))
    assert layer.keys.data_ptr() == before
    layer.update(*torch.randn(2, 2, 3, 1, 8))
    assert layer.keys.data_ptr() != before and layer.keys.shape[2] == 9 + layer.spare_tokens + 1
