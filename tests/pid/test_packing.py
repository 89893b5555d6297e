"""Decoding with packed weights: the same tokens, and no trace afterwards."""

from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import pytest
import torch
from accuracy import WithinRounding
from models import TEXT_FAMILIES, build, decided, inputs
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from peft_kernels import pid
from peft_kernels.ops import native_library
from peft_kernels.pid import packing

pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN"),
    pytest.mark.skipif(native_library.load_error() is not None, reason=str(native_library.load_error())),
]
BEAMS = {"num_beams": 3, "max_new_tokens": 10, "no_repeat_ngram_size": 2}


class Watch(LogitsProcessor):
    """Called once a step: records which linear layers have a packed forward, then calls ``then``."""

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
    plain = decided(swapped(model, pack_weights=False), lambda: model.generate(**x, **BEAMS))
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
    kwargs = {
        "num_return_sequences": 2,
        "do_sample": True,
        "output_logits": True,
        "return_dict_in_generate": True,
        "max_new_tokens": 1,
    }
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


@pytest.mark.parametrize("kind", ["in-place", "load_state_dict", "assign", "data", "inside data", "inference-mode"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_changed_weights_are_noticed(family, kind, swapped):
    model, other, x = swapped(build(family)), build(family, seed=5), inputs()
    before = model.generate(**x, **BEAMS)
    if kind in ("load_state_dict", "assign"):
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
                elif kind == "inside data":
                    p.data.copy_(q)
                else:
                    p.copy_(q)
    after = model.generate(**x, **BEAMS)
    assert not torch.equal(after, before)
    assert torch.equal(after, decided(other, lambda: other.generate(**x, **BEAMS)))


OPTIMIZERS = {"foreach": {"foreach": True}, "for-loop": {"foreach": False}, "fused": {"fused": True}}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "name",
    ["SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD", "Muon"],
)
def test_steps_of_optimizers_are_noticed(name, kind, swapped):
    optimizer = getattr(torch.optim, name, None)
    if optimizer is None or not OPTIMIZERS[kind].keys() <= signature(optimizer).parameters.keys():
        pytest.skip(f"torch has no {kind} {name}")
    model, x = swapped(build("bart")), inputs()
    model.generate(**x, **BEAMS)
    parameters = [p for p in model.parameters() if p.ndim == 2]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer(parameters, lr=0.1, **OPTIMIZERS[kind]).step()
    assert_packed_weights_are_the_layers(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.data.neg_(),
        lambda w: w.data.copy_(w.data.flip(0)),
        lambda w: w.data.copy_(w.data.flip(1)),
        lambda w: w.data[-1, -1].mul_(1 + 2**-23),
        lambda w: w.data.view(torch.int32)[0, 0].bitwise_xor_(1),
        lambda w: w.data.numpy().__setitem__((0, slice(None)), 0),
        lambda w: w.data.div_(0.05).round_().mul_(0.05),
    ],
    ids=["signs", "rows", "columns", "last bit of the last", "one bit", "through numpy", "quantised in place"],
)
def test_small_changes_behind_autograd_are_noticed(change, swapped):
    model, x = swapped(build("bart")), inputs()
    model.generate(**x, **BEAMS)
    for layer in packing._linears(model):
        change(layer.weight)
    assert_packed_weights_are_the_layers(model)


def test_merged_adapters_are_noticed(swapped):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "out_proj"], init_lora_weights=False)
    model = get_peft_model(swapped(build("bart")), config).eval()
    for change in (lambda: None, model.merge_adapter, model.unmerge_adapter):
        change()
        model.generate(**inputs(), **BEAMS)
        assert_packed_weights_are_the_layers(model.get_base_model())


def assert_packed_weights_are_the_layers(model):
    """The packed matmul of every layer uses its current weight."""
    with packing.packed_linears(model), torch.no_grad():
        packed = packing._packed.get()
        assert set(packed) == set(packing._linears(model))
        for layer in packed:
            again = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().clone(), packing.ROWS_HINT)
            assert torch.equal(packed[layer].to_dense(), again.to_dense())


def test_threads_with_and_without_packed_weights(swapped):
    """A forward in another thread uses plain weights and has gradients while this thread generates."""
    model = swapped(build("t5"))
    with packing.packed_linears(model), ThreadPoolExecutor(1) as pool:
        assert pool.submit(packing._packed.get).result() is None
        with packing.packed_linears(model):
            assert packing._packed.get()
        assert patched(model) and packing._packed.get()
    assert not patched(model) and packing._packed.get() is None and not packing._users


def test_gradients_go_through_plain_weights(swapped):
    """The packed matmul has no gradient; enabling gradients within ``generate`` gives those of ``nn.Linear``."""
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
    known = len(packing._copies)
    model.generate(**inputs(), **BEAMS)
    assert len(packing._copies) > known
    pid.disable(model)
    assert len(packing._copies) == known


def test_bypassed_linears_keep_their_own_forward(swapped):
    """A forward that other code has put on a layer stays."""
    model = swapped(build("t5"))
    calls, layer = [], model.get_output_embeddings()
    layer.forward = lambda x: (calls.append(1), nn.Linear.forward(layer, x))[1]
    model.generate(**inputs(), **BEAMS)
    assert len(calls) == 10 and "forward" in vars(layer)
