"""Operators' cases in other memory layouts, and the calls below an operator."""

import torch
from operator_cases import implementations_of, run
from torch import Tensor


def column(x):
    """One of three columns; the others are 0, which a kernel that ignores the stride would read."""
    wide = x.new_zeros(*x.shape, 3)
    wide[..., 0] = x
    return wide[..., 0]


def every_second(x):
    return x.repeat_interleave(2, 0)[::2]


def expanded(x):
    """The first row, expanded to all rows; 0 follows it in memory."""
    return torch.cat([x[:1], torch.zeros_like(x)])[:1].expand(x.shape)


LAYOUTS = [column, every_second, expanded]


def laid_out(case, layout, dtype, device):
    """The case with its arguments in ``layout``."""
    result = {}
    for key, x in case.tensors.items():
        x = x.to(device) if x.is_floating_point() or key in ("seed", "labels") else x.to(device, dtype)
        result[key] = layout(x) if key in case.laid_out and not (layout is expanded and key in case.varying) else x
    return case._replace(tensors=result)


def dense(case):
    return case._replace(tensors={key: x.contiguous() for key, x in case.tensors.items()})


class Recorder:
    """An implementation that records its calls."""

    def __init__(self, implementation):
        self.implementation, self.calls = implementation, []

    def __getattr__(self, name):
        function = getattr(self.implementation, name)
        if not callable(function) or name == "unavailable":
            return function

        def called(*arguments):
            copies = [
                x.detach().clone(memory_format=torch.preserve_format) if isinstance(x, Tensor) else x for x in arguments
            ]
            self.calls.append((function, copies))
            return function(*arguments)

        return called


def recorded_calls(name, impl, case, device, monkeypatch):
    """The functions of an implementation that an operator calls, forward and backward, and their arguments; integers
    are int32.
    """
    package = implementations_of(case.package)
    recorder = Recorder(package.module(impl))
    with monkeypatch.context() as patch:
        patch.setattr(package, "module", lambda _: recorder)
        run(name, impl, laid_out(case, torch.Tensor.contiguous, torch.int32, device))
    assert recorder.calls
    return recorder.calls
