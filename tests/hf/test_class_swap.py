"""Mixins on one object, put on and taken off in any order, whatever other code does to its class in between."""

import copy
import functools
import itertools
import pickle
import threading

import pytest
import torch
from torch import nn

from peft_kernels.hf.class_swap import Swapped, put_on, take_off


class Stock(nn.Linear):
    def __init__(self, *shape):
        super().__init__(*shape)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(10).round_()  # sums of integers are exact in any order

    def forward(self, x):
        return super().forward(x)


class Plus(Swapped):
    def forward(self, x):
        return super().forward(x) + 1


class Twice(Swapped):
    def forward(self, x):
        return 2 * super().forward(x)


class Negative(Swapped):
    def forward(self, x):
        return -super().forward(x)


MIXINS = {Plus: lambda y: y + 1, Twice: lambda y: 2 * y, Negative: lambda y: -y}
X = torch.ones(1, 3)


def _expected(layer, on):
    y = nn.functional.linear(X, layer.weight, layer.bias)
    for mixin in on:  # the last one put on acts last
        y = MIXINS[mixin](y)
    return y


@pytest.mark.parametrize("off", list(itertools.permutations(MIXINS)))
def test_any_order(off):
    layer = Stock(3, 2)
    on = list(MIXINS)
    for mixin in on:
        put_on(layer, mixin)
    for mixin in off:
        for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(twin) is type(layer) and torch.equal(twin(X), _expected(layer, on))
        take_off(layer, mixin)
        on.remove(mixin)
    assert type(layer) is Stock and torch.equal(layer(X), _expected(layer, []))


def test_a_class_derived_by_others():
    """FSDP2 derives such a class."""
    layer = Stock(3, 2)
    put_on(layer, Plus)
    put_on(layer, Twice)
    layer.__class__ = type("Sharded", (type("Mark", (), {}), type(layer)), {"kept": 7})
    put_on(layer, Negative)
    on = [Plus, Twice, Negative]
    for mixin in (Plus, Negative, Twice):
        assert torch.equal(layer(X), _expected(layer, on)) and layer.kept == 7
        take_off(layer, mixin)
        on.remove(mixin)
    assert [c.__name__ for c in type(layer).__mro__[:3]] == ["Sharded", "Mark", "Stock"]


class Wrapping(nn.Module):
    """Wraps the method of every subclass, as transformers does for checkpointing."""

    def __init_subclass__(cls):
        forward = cls.forward

        @functools.wraps(forward)
        def wrapped(self, x):
            return forward(self, x)

        cls.forward = wrapped


class Wrapped(Wrapping):
    def forward(self, x):
        return 3 * x


def test_a_base_that_wraps_methods_of_subclasses():
    layer = Wrapped()
    put_on(layer, Plus)
    layer.__class__ = type("Sharded", (type(layer),), {})
    assert torch.equal(layer(X), 3 * X + 1)
    take_off(layer, Plus)
    assert type(layer).__name__ == "Sharded" and torch.equal(layer(X), 3 * X)


def test_methods_that_others_keep():
    """accelerate replaces ``forward`` on the object and calls the bound method that it found there."""
    layer = Stock(3, 2)
    put_on(layer, Plus)
    layer._old_forward = layer.forward
    layer.forward = lambda x: 10 * layer._old_forward(x)
    assert torch.equal(layer(X), 10 * _expected(layer, [Plus]))
    put_on(layer, Twice)
    assert torch.equal(layer(X), 10 * _expected(layer, [Plus, Twice]))
    take_off(layer, Plus)
    take_off(layer, Twice)
    assert torch.equal(layer(X), 10 * _expected(layer, []))


class Locked(nn.Module):
    """Defines its own pickled state."""

    def __init__(self):
        super().__init__()
        self.lock, self.value = threading.Lock(), 5

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "lock"}


class Mark(Swapped):
    pass


def test_the_class_says_what_is_pickled():
    module = Locked()
    put_on(module, Mark)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.value == 5 and isinstance(twin, Mark) and not hasattr(twin, "lock")


def test_misuse():
    layer = Stock(3, 2)
    with pytest.raises(RuntimeError, match="Stock has no mixin Plus to take off"):
        take_off(layer, Plus)
    put_on(layer, Plus)
    with pytest.raises(RuntimeError, match="Stock already has the mixin Plus"):
        put_on(layer, Plus)
