"""Methods are added and removed in any order; the results are those of the methods that remain."""

from functools import cache
from itertools import permutations

import pytest
import torch
from combinations import Expected, bert, inputs, put_on, result, t5

from peft_kernels import pasta, pid

ADAPTERS = ["LoRA", "DePT", "IA3", "prompt tuning", "prefix tuning"]


def take_off(model, name):
    if name == "PiD":
        return pid.disable(model)
    if name == "fuse":
        pasta.unfuse(model)
        return model
    return model.get_base_model() if "tuning" in name else model.unload()


def plain(x, enabled):
    """Labels for one stream per input if PiD is off."""
    return x if enabled else x | {"labels": x["labels"][:2]}


@cache
def expected_of(model_of, names: frozenset):
    """The results of a model with only the remaining methods: adapters first, PiD last."""
    model = model_of()
    for name in sorted(names, key=lambda name: (name in ("PiD", "fuse"), name)):
        model = put_on(model, name)
    return Expected(model, plain(inputs("PiD"), "PiD" in names) if model_of is t5 else inputs("PASTA"))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize("off", [0, 1])
def test_pid_and_an_adapter(adapter, on, off):
    names, x, model, present = ["PiD", adapter], inputs("PiD"), t5(), set()
    for name in names[::-1] if on else names:
        model = put_on(model, name)
        present.add(name)
        expected_of(t5, frozenset(present)).check(result(model, plain(x, "PiD" in present)))
    for name in names[::-1] if off else names:
        model = take_off(model, name)
        present.remove(name)
        expected_of(t5, frozenset(present)).check(result(model, plain(x, "PiD" in present)))
    assert type(model) is type(t5())


@pytest.mark.parametrize("off", permutations(["fuse", "adapter"]))
@pytest.mark.parametrize("on", permutations(["fuse", "adapter"]))
@pytest.mark.parametrize("adapter", ["PASTA", "LoRA", "IA3", "DePT"])
def test_fuse_and_an_adapter(adapter, on, off):
    x, model, present = inputs("PASTA"), bert(), set()
    for name in (adapter if name == "adapter" else name for name in on):
        model = put_on(model, name)
        present.add(name)
        expected_of(bert, frozenset(present)).check(result(model, x))
    for name in (adapter if name == "adapter" else name for name in off):
        model = take_off(model, name)
        present.remove(name)
        if present:
            expected_of(bert, frozenset(present)).check(result(model, x))
    assert type(model) is type(bert())


@pytest.mark.parametrize("adapter", ["DePT", "LoRA", "IA3"])
def test_set_disable_and_delete_under_pid(adapter):
    import copy

    x = inputs("PiD")
    model = put_on(put_on(t5(), "PiD"), adapter)
    first = Expected(model, x)
    loss = result(model, x)["loss"]
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".second" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    second = Expected(model, x)
    with pytest.raises(AssertionError, match="error"):
        second.numbers.check({"loss": loss})
    model.set_adapter("default")
    first.check(result(model, x))
    with model.disable_adapter():
        expected_of(t5, frozenset(["PiD"])).check(result(model, x))
    model.delete_adapter("default")
    model.set_adapter("second")
    second.check(result(model, x))
    pid.disable(model)
    assert torch.equal(result(model, plain(x, False))["tokens"], second.tokens)
