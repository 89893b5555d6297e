"""Methods are put on and taken off in any order; results are those of what is left on."""

from itertools import permutations

import pytest
import torch
from combinations import assert_same, bert, inputs, put_on, result, t5

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
    """Labels for one stream of each input where PiD is off."""
    return x if enabled else x | {"labels": x["labels"][:2]}


def expected_of(model_of, names, x):
    """With what is on, put on alone: adapters first, PiD last."""
    model = model_of()
    for name in sorted(names, key=lambda name: name in ("PiD", "fuse")):
        model = put_on(model, name)
    return result(model, x)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize("off", [0, 1])
def test_pid_and_an_adapter(adapter, on, off):
    names, x, model, present = ["PiD", adapter], inputs("PiD"), t5(), set()
    for name in names[::-1] if on else names:
        model = put_on(model, name)
        present.add(name)
        y = plain(x, "PiD" in present)
        assert_same(result(model, y), expected_of(t5, present, y))
    for name in names[::-1] if off else names:
        model = take_off(model, name)
        present.remove(name)
        y = plain(x, "PiD" in present)
        assert_same(result(model, y), expected_of(t5, present, y))
    assert type(model) is type(t5())


@pytest.mark.parametrize("off", permutations(["fuse", "adapter"]))
@pytest.mark.parametrize("on", permutations(["fuse", "adapter"]))
@pytest.mark.parametrize("adapter", ["PASTA", "LoRA", "IA3", "DePT"])
def test_fuse_and_an_adapter(adapter, on, off):
    x, model, present = inputs("PASTA"), bert(), set()
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    for name in (adapter if name == "adapter" else name for name in on):
        model = put_on(model, name)
        present.add(name)
        assert_same(result(model, x), expected_of(bert, present, x), close)
    for name in (adapter if name == "adapter" else name for name in off):
        model = take_off(model, name)
        present.remove(name)
        if present:
            assert_same(result(model, x), expected_of(bert, present, x), close)
    assert type(model) is type(bert())


@pytest.mark.parametrize("adapter", ["DePT", "LoRA", "IA3"])
def test_set_disable_and_delete_under_pid(adapter):
    import copy

    x = inputs("PiD")
    model = put_on(put_on(t5(), "PiD"), adapter)
    first = result(model, x)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".second" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    second = result(model, x)
    assert not torch.equal(first["loss"], second["loss"])
    model.set_adapter("default")
    assert_same(result(model, x), first)
    with model.disable_adapter():
        assert_same(result(model, x), expected_of(t5, {"PiD"}, x))
    model.delete_adapter("default")
    model.set_adapter("second")
    assert_same(result(model, x), second)
    pid.disable(model)
    y = plain(x, False)
    assert torch.equal(result(model, y)["tokens"], second["tokens"])
