"""Plain ``model.generate`` on an enabled model: the same tokens as stock transformers, from shared keys and values."""

import pytest
import torch
from accuracy import WithinRounding
from models import TEXT_FAMILIES, build, decided, inputs, shared
from transformers.cache_utils import EncoderDecoderCache

from peft_kernels.hf.names import cache_of

MODES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "beams-returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 20},
    "sampling-returned": {"do_sample": True, "num_return_sequences": 4, "temperature": 3.0},
    "beam-sampling": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "temperature": 3.0},
    "static": {"cache_implementation": "static"},
    "static-beams": {"cache_implementation": "static", "num_beams": 3},
    "uncached-beams": {"use_cache": False, "num_beams": 3},
    "no-encoder-ngrams": {"num_beams": 3, "encoder_no_repeat_ngram_size": 1},
}


def generate(model, x, **kwargs):
    torch.manual_seed(3)
    # repeated tokens tell less
    return model.generate(**x, **{"max_new_tokens": 10, "no_repeat_ngram_size": 2, **kwargs})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_tokens_are_stock(family, mode, swapped):
    model, x, kwargs = shared(family), inputs(), MODES[mode]
    stock = decided(model, lambda: generate(model, x, **kwargs))
    assert stock.unique().numel() > 6  # otherwise the comparison would be empty
    assert torch.equal(generate(swapped(model), x, **kwargs), stock)


@pytest.mark.parametrize("mask", ["full", "left", "holes", None])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_encoder_masks(family, mask, swapped):
    model, x = shared(family), inputs(mask=mask or "full", seed=2)
    if mask is None:
        x.pop("attention_mask")
    stock = decided(model, lambda: generate(model, x, num_beams=3))
    assert torch.equal(generate(swapped(model), x, num_beams=3), stock)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_eager_attention(family, swapped):
    model, x = shared(family, "eager"), inputs()
    stock = decided(model, lambda: generate(model, x, num_beams=3))
    assert torch.equal(generate(swapped(model), x, num_beams=3), stock)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0}, {"num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder-wide"])
def test_scores_are_stock(family, kwargs, swapped):
    model, x = shared(family), inputs()
    kwargs = dict(kwargs, output_scores=True, output_logits=True, return_dict_in_generate=True, max_new_tokens=16)

    def results(model):
        out = generate(model, x, **kwargs)
        return out.sequences, out.scores, out.logits

    stock = WithinRounding(lambda: results(model), results(build(family).double()))
    stock.check(results(swapped(model)))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_outputs_can_be_handed_in(family, swapped):
    model, x = shared(family), inputs()
    stock = decided(model, lambda: generate(model, x, num_beams=3))
    ours = swapped(model)
    with torch.no_grad():
        encoded = ours.get_encoder()(**x)
    x["encoder_outputs"] = encoded
    kept = encoded.last_hidden_state.clone()
    assert torch.equal(generate(ours, x, num_beams=3), stock)
    assert torch.equal(encoded.last_hidden_state, kept)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_more_decoder_rows_than_inputs(family, swapped):
    """Decoder prefixes of equal length go straight through ``generate``: N = b * M rows."""
    model, x = shared(family), inputs()
    ids = torch.randint(4, 99, (6, 3), generator=torch.Generator().manual_seed(5))
    repeated = {k: v.repeat_interleave(2, 0) for k, v in x.items()}
    extra = {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    stock = decided(model, lambda: generate(model, repeated, **extra, num_beams=2))
    assert torch.equal(generate(swapped(model), x, **extra, num_beams=2), stock)


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder-wide"])
@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_index(family, beams, swapped):
    """Inputs with one, none and three rows."""
    model, x = shared(family), inputs()
    index = torch.tensor([0, 2, 2, 2])
    ids = torch.randint(4, 99, (4, 3), generator=torch.Generator().manual_seed(5))
    extra = {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids), "num_beams": beams}
    stock = decided(model, lambda: generate(model, {k: v[index] for k, v in x.items()}, **extra))
    assert torch.equal(generate(swapped(model), x, encoder_index=index, **extra), stock)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["t5", "umt5", "bart", "encoder-decoder"])
def test_cross_memory_is_one_part_in_m(family, cache, swapped, monkeypatch):
    beams, caches = 5, []
    prefill = type(shared(family))._prefill

    def spy(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        caches.append(cache_of(model_kwargs))
        return prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs)

    def cross_bytes(model):
        generate(model, inputs(), num_beams=beams, cache_implementation=cache)
        assert isinstance(caches[-1], EncoderDecoderCache)
        return sum(x.nbytes for layer in caches[-1].cross_attention_cache.layers for x in (layer.keys, layer.values))

    model = shared(family)
    monkeypatch.setattr(type(model), "_prefill", spy)
    stock = cross_bytes(model)
    assert stock == beams * cross_bytes(swapped(model)) > 0


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_prefill_computes_the_last_position_only(family, swapped):
    model, x, widths = swapped(shared(family)), inputs(), []
    ids = torch.randint(4, 99, (6, 5), generator=torch.Generator().manual_seed(5))
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _, args, logits: widths.append(logits.shape[:2])
    )
    try:
        generate(model, x, decoder_input_ids=ids, max_new_tokens=4)
    finally:
        handle.remove()
    assert widths == [(6, 1)] * 4


def test_dtype_bfloat16_generates_from_shared_keys(swapped):
    """In bfloat16 rounding differs, so tokens may; the logits of the first step agree within the precision of the
    type.
    """
    model, x = build("t5").bfloat16(), inputs()
    settings = {
        "num_return_sequences": 2,
        "do_sample": True,
        "output_logits": True,
        "return_dict_in_generate": True,
        "max_new_tokens": 1,
    }
    truth = generate(build("t5").double(), x, **settings).logits[0]
    stock = WithinRounding(lambda: generate(model, x, **settings).logits[0], truth)
    stock.check(generate(swapped(model), x, **settings).logits[0])
