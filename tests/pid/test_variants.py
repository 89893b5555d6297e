"""Attention weights from the eager variant, and the decoder step as one compiled graph."""

import copy

import pytest
import torch
from models import TEXT_FAMILIES, build, inputs, shared
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from peft_kernels import pid
from peft_kernels.pid.cache import filled

INDEX = {"uniform": torch.tensor([0, 0, 1, 1, 2, 2]), "ragged": torch.tensor([0, 1, 1, 1, 1, 2])}


def repeat(x, index):
    return {k: v[index] for k, v in x.items()}


@pytest.mark.parametrize("mask", ["right", "full"])
@pytest.mark.parametrize("index", INDEX)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_cross_attention_weights_are_stock(family, index, mask, swapped):
    model, x = shared(family, "eager"), inputs(mask=mask)
    ids = torch.randint(4, 99, (6, 4), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        asked = repeat(x, INDEX[index]) | {"decoder_input_ids": ids, "output_attentions": True}
        stock, truth = model(**asked), copy.deepcopy(model).double()(**asked)
        ours = swapped(model)(**x, decoder_input_ids=ids, output_attentions=True, encoder_index=None if index == "uniform" else INDEX[index])
    assert len(ours.cross_attentions) == len(stock.cross_attentions) == 2
    for name in ("cross_attentions", "decoder_attentions"):
        for mine, theirs, true in zip(ours[name], stock[name], truth[name]):
            error, allowed = ((a.double() - true).abs().max().item() for a in (mine, theirs))
            assert error <= 2 * allowed + 1e-6, f"{name}: error {error:.1e}, stock {allowed:.1e}"
    assert all(a.shape[0] == 3 for a in ours.encoder_attentions)


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_weights_while_generating(family, swapped):
    model, x = shared(family, "eager"), inputs()
    kwargs = {"num_beams": 3, "max_new_tokens": 5, "output_attentions": True, "return_dict_in_generate": True}
    stock, ours = model.generate(**x, **kwargs), swapped(model).generate(**x, **kwargs)
    assert torch.equal(ours.sequences, stock.sequences)
    for mine, theirs in zip(ours.cross_attentions, stock.cross_attentions):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoder_step_compiles_as_one_graph(family, attention):
    """Four streams per input, one token on top of six, keys and values of the inputs in the cache."""
    model, x = pid.enable(build(family, attention)), inputs(2, mask="full")
    ids = torch.randint(4, 99, (8, 7), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def step(decode):
        states = model.get_encoder()(**x).last_hidden_state
        cache = filled(model, states, DynamicCache(config=model.config.get_text_config(decoder=True)), num_streams=8)
        model(encoder_outputs=BaseModelOutput(states), decoder_input_ids=ids[:, :6], past_key_values=cache)
        return decode(encoder_outputs=BaseModelOutput(states), decoder_input_ids=ids[:, 6:], past_key_values=cache).logits

    torch._dynamo.reset()
    assert torch.equal(step(torch.compile(model, fullgraph=True, backend="aot_eager")), step(model))


def test_labelled_streams_compile():
    """Training, with the graph broken where lengths are read."""
    model, x, extra = pid.enable(build("bart").double()), inputs(), {"encoder_index": INDEX["ragged"]}
    labels = torch.randint(4, 99, (6, 4), generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    model(**x, labels=labels, **extra).loss.backward()
    torch.compile(twin, backend="aot_eager")(**x, labels=labels, **extra).loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters()):
        assert (p.grad - q[1].grad).norm() <= 1e-9 * p.grad.norm() + 1e-12, name
