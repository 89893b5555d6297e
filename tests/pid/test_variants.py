"""Attention weights from the eager variant, and the decoder step as one compiled graph."""

import copy

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from models import TEXT_FAMILIES, build, inputs, shared
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from peft_kernels import pid
from peft_kernels.pid.cache import filled_cache

INDEX = {"uniform": torch.tensor([0, 0, 1, 1, 2, 2]), "ragged": torch.tensor([0, 1, 1, 1, 1, 2])}


def repeat(x, index):
    return {k: v[index] for k, v in x.items()}


@pytest.mark.parametrize("mask", ["right", "full"])
@pytest.mark.parametrize("index", INDEX)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_cross_attention_weights_are_stock(family, index, mask, swapped):
    model, x = shared(family, "eager"), inputs(mask=mask)
    ids = torch.randint(4, 99, (6, 4), generator=torch.Generator().manual_seed(1))
    asked = repeat(x, INDEX[index]) | {"decoder_input_ids": ids, "output_attentions": True}

    @torch.no_grad()
    def stock(model=model):
        output = model(**asked)
        return output.cross_attentions, output.decoder_attentions

    expected = WithinRounding(stock, stock(copy.deepcopy(model).double()))
    with torch.no_grad():
        ours = swapped(model)(
            **x,
            decoder_input_ids=ids,
            output_attentions=True,
            encoder_index=None if index == "uniform" else INDEX[index],
        )
    assert len(ours.cross_attentions) == 2
    expected.check((ours.cross_attentions, ours.decoder_attentions))
    assert all(a.shape[0] == 3 for a in ours.encoder_attentions)


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_weights_while_generating(family, swapped):
    # if rounding decided the order of two beams, their weights would be swapped
    model, x = (
        build(family, "eager").double(),
        inputs(),
    )

    def generate(model):
        out = model.generate(**x, num_beams=3, max_new_tokens=5, output_attentions=True, return_dict_in_generate=True)
        return out.sequences, out.cross_attentions

    expected = WithinRounding(lambda: generate(model))
    expected.check(generate(swapped(model)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoder_step_compiles_as_one_graph(family, attention):
    """Four streams per input, one token after six, with the inputs' keys and values in the cache."""
    model, x = pid.enable(build(family, attention)), inputs(2, mask="full")
    ids = torch.randint(4, 99, (8, 7), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def step(decode):
        states = model.get_encoder()(**x).last_hidden_state
        cache = filled_cache(
            model, states, DynamicCache(config=model.config.get_text_config(decoder=True)), num_streams=8
        )
        model(encoder_outputs=BaseModelOutput(states), decoder_input_ids=ids[:, :6], past_key_values=cache)
        return decode(
            encoder_outputs=BaseModelOutput(states), decoder_input_ids=ids[:, 6:], past_key_values=cache
        ).logits

    torch._dynamo.reset()
    assert_within_rounding(step(torch.compile(model, fullgraph=True, backend="aot_eager")), lambda: step(model))


def test_labelled_streams_compile():
    """Training, with a graph break where lengths are read."""
    model, x, extra = pid.enable(build("bart").double()), inputs(), {"encoder_index": INDEX["ragged"]}
    labels = torch.randint(4, 99, (6, 4), generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(model)
    torch._dynamo.reset()

    def gradients(run, model):
        return torch.autograd.grad(run(**x, labels=labels, **extra).loss, list(model.parameters()), allow_unused=True)

    got = gradients(torch.compile(twin, backend="aot_eager"), twin)
    assert_within_rounding(got, lambda: gradients(model, model))
