"""Decoding on packed weights: the same tokens, and no trace afterwards."""

import pytest
import torch
from accuracy import WithinRounding
from models import TEXT_FAMILIES, build, inputs
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from peft_kernels import pid
from peft_kernels.pid import packing

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
BEAMS = {"num_beams": 3, "max_new_tokens": 10, "no_repeat_ngram_size": 2}


class Watch(LogitsProcessor):
    """Called once a step: looks at the model's linear layers, then does what it was told."""

    def __init__(self, model, then=lambda: None):
        self.model, self.then, self.seen = model, then, []

    def __call__(self, input_ids, scores):
        self.seen.append(patched(self.model))
        self.then()
        return scores


def patched(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "forward" in vars(m)]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_tokens_are_those_of_plain_weights(family, swapped):
    model, x = build(family), inputs()
    plain = swapped(model, pack_weights=False).generate(**x, **BEAMS)
    watch = Watch(model)
    assert torch.equal(swapped(model).generate(**x, **BEAMS, logits_processor=LogitsProcessorList([watch])), plain)
    assert watch.seen[0]
    assert not patched(model)


def test_plain_weights_on_request(swapped):
    model = swapped(build("t5"), pack_weights=False)
    watch = Watch(model)
    model.generate(**inputs(), **BEAMS, logits_processor=LogitsProcessorList([watch]))
    assert not any(watch.seen) and len(watch.seen) == 10


def test_bfloat16_is_as_exact_as_plain_weights(swapped):
    model, x = build("bart").bfloat16(), inputs()
    kwargs = {"num_return_sequences": 2, "do_sample": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 1}
    truth = build("bart").double().generate(**x, **kwargs).logits[0]
    plain = WithinRounding(lambda: swapped(model, pack_weights=False).generate(**x, **kwargs).logits[0], truth)
    watch = Watch(model)
    packed = swapped(model).generate(**x, **kwargs, logits_processor=LogitsProcessorList([watch])).logits[0]
    assert watch.seen[0]
    plain.check(packed)


def test_restored_after_an_exception(swapped):
    model = swapped(build("t5"))

    def fail():
        raise RuntimeError("enough")

    watch = Watch(model, fail)
    with pytest.raises(RuntimeError, match="enough"):
        model.generate(**inputs(), **BEAMS, logits_processor=LogitsProcessorList([watch]))
    assert watch.seen[0] and not patched(model)
    linear = model.get_output_embeddings()
    assert linear.forward.__func__ is nn.Linear.forward


@pytest.mark.parametrize("kind", ["in-place", "optimizer", "load_state_dict", "assign", "data", "inference-mode"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_changed_weights_are_noticed(family, kind, swapped):
    model, other, x = swapped(build(family)), build(family, seed=5), inputs()
    before = model.generate(**x, **BEAMS)
    if kind == "optimizer":
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        other.load_state_dict(model.state_dict())
    elif kind in ("load_state_dict", "assign"):
        model.load_state_dict(other.state_dict(), assign=kind == "assign")
    elif kind == "inference-mode":
        with torch.inference_mode():
            for p, q in zip(model.parameters(), other.parameters()):
                p.copy_(q)
    else:
        with torch.no_grad():
            for p, q in zip(model.parameters(), other.parameters()):
                if kind == "data":
                    p.data = q.data.clone()
                else:
                    p.copy_(q)
    after = model.generate(**x, **BEAMS)
    assert not torch.equal(after, before)
    assert torch.equal(after, other.generate(**x, **BEAMS))


def test_gradients_go_through_plain_weights(swapped):
    """The packed product has none; whoever turns gradients on within ``generate`` gets those of ``nn.Linear``."""
    model, labels = swapped(build("t5")), torch.randint(4, 99, (6, 4))

    def gradients():
        model.zero_grad()
        model(**inputs(), labels=labels).loss.backward()
        return [p.grad for p in model.parameters()]

    expected = gradients()
    with packing.packed_linears(model):
        assert patched(model)
        ours = gradients()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


def test_packed_copies_go_with_disable_and_with_the_model():
    model = pid.enable(build("t5"))
    known = len(packing._packed)
    model.generate(**inputs(), **BEAMS)
    assert len(packing._packed) > known
    pid.disable(model)
    assert len(packing._packed) == known


def test_bypassed_linears_keep_their_own_forward(swapped):
    """A forward that somebody else has put on a layer stays."""
    model = swapped(build("t5"))
    calls, layer = [], model.get_output_embeddings()
    layer.forward = lambda x: (calls.append(1), nn.Linear.forward(layer, x))[1]
    model.generate(**inputs(), **BEAMS)
    assert len(calls) == 10 and "forward" in vars(layer)
