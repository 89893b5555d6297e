import copy
import pickle

import pytest
import torch
from threads import in_threads
from torch import nn

from peft_kernels.hf.call_state import CallState


class Inner(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def forward(self, x):
        return x + self.state.get()


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = CallState()
        self.inner = Inner(self.state)
        self.register_forward_pre_hook(self.before)
        self.register_forward_hook(self.after)

    def before(self, module, args):
        self.state.set(args[0].sum())

    def after(self, module, args, output):
        self.state.set(None)

    def forward(self, x):
        return 2 * self.inner(x)


def compiled_inside(model):
    model.inner.compile(fullgraph=True, backend="eager")
    return model


@pytest.mark.parametrize(
    "prepare",
    [lambda model: model, lambda model: torch.compile(model, fullgraph=True, backend="eager"), compiled_inside],
    ids=["eager", "compiled", "layers compiled"],
)
def test_threads_do_not_meet(prepare):
    model = prepare(Outer())

    def serve(number):
        for step in range(50):
            x = torch.arange(3.0) + 100 * number + step
            assert torch.equal(model(x), 2 * (x + x.sum()))

    serve(0)
    in_threads(4, serve)


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_share_no_state(twin_of):
    model = Outer()
    model.state.set(torch.ones(()))
    twin = twin_of(model)
    assert twin.state is twin.inner.state is not model.state and twin.state.get() is None
    assert torch.equal(twin(torch.ones(3)), torch.full((3,), 8.0))
