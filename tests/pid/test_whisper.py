"""Whisper: one recording, several beams or samples; it has no text prompts and no encoder mask."""

import copy

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from models import EarlyEnds, build, decided, shared
from transformers import LogitsProcessorList

from peft_kernels import pid


@pytest.fixture
def x():
    return {"input_features": torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(1)) * 3}


def generate(model, x, **kwargs):
    torch.manual_seed(3)
    return model.generate(**x, max_new_tokens=10, no_repeat_ngram_size=2, **kwargs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0},
        {"num_beams": 3, "use_cache": False},
    ],
    ids=["greedy", "beams", "beams-returned", "sampling", "uncached-beams"],
)
def test_tokens_are_stock(kwargs, attention, x, swapped):
    model = shared("whisper", attention)
    stock = decided(model, lambda: generate(model, x, **kwargs))
    assert stock.unique().numel() > 6
    assert torch.equal(generate(swapped(model), x, **kwargs), stock)


def test_streams_that_end_early(x, swapped):
    """For samples Whisper repeats the recordings itself: nothing is shared or dropped, and the result is right."""
    model, ends = shared("whisper"), [99, 99, 99, 2, 1, 1, 1, 1, 1]
    kwargs = {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0}
    stock = decided(
        model, lambda: generate(model, x, logits_processor=LogitsProcessorList([EarlyEnds(ends)]), **kwargs)
    )
    assert torch.equal(
        generate(swapped(model), x, logits_processor=LogitsProcessorList([EarlyEnds(ends)]), **kwargs), stock
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_gradients_are_those_of_repeated_inputs(x, use_cache):
    model = build("whisper").double().train()
    x["input_features"] = x["input_features"].double()
    stock, labels = copy.deepcopy(model), torch.randint(4, 99, (6, 5))

    def gradients():
        stock.zero_grad()
        stock(input_features=x["input_features"].repeat_interleave(2, 0), labels=labels).loss.backward()
        return [None if p.grad is None else p.grad.clone() for p in stock.parameters()]

    out = pid.enable(model)(**x, labels=labels, use_cache=use_cache)
    out.loss.backward()
    assert (out.past_key_values is not None) == use_cache
    assert_within_rounding([p.grad for p in model.parameters()], gradients)


def test_ragged_streams_see_their_own_clip(x, swapped):
    """Whisper's decoder takes no mask that could carry the index: each stream gets its own encoder states."""
    model, index, ids = shared("whisper"), torch.tensor([0, 0, 1, 2]), torch.randint(4, 99, (4, 3))
    features = x["input_features"]
    expected = WithinRounding(lambda: model(input_features=features[index], decoder_input_ids=ids).logits)
    expected.check(swapped(model)(**x, decoder_input_ids=ids, encoder_index=index).logits)


def test_refusals(x, swapped):
    model, ids = swapped(shared("whisper")), torch.randint(4, 99, (4, 3))
    for call in (
        lambda: pid.generate(model, torch.zeros(3, 4).long(), [[5]]),
        lambda: pid.forward(model, torch.zeros(3, 4).long(), [[5]], [[[5]]] * 3),
    ):
        with pytest.raises(ValueError, match="'whisper' takes no text prompts; use model.generate"):
            call()
    with pytest.raises(ValueError, match="multiple of the encoder's inputs, got 4 rows for 3 inputs"):
        model(**x, decoder_input_ids=ids)
    trained = build("whisper").train()
    trained.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="'whisper'.*gradient checkpointing"):
        pid.enable(trained)(**x, labels=torch.randint(4, 99, (6, 3)))
