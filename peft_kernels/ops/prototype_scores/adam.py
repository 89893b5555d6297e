"""Adam for a training loop without autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpp


class Adam:
    """``torch.optim.Adam`` with its defaults but for ``lr``, on gradients that the caller passes in.

    On the CPU with the native library, a step is one fused pass, since torch's step takes longer than DecT's matmuls.
    Elsewhere it is torch's own step.

    Args:
        parameters: contiguous float32 tensors on one device, changed in place.
        lr: the learning rate.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float):
        self.parameters, self.lr, self.steps = list(parameters), lr, 0
        first = self.parameters[0]
        self.moments = self.optimizer = None
        if cpp.unavailable(first.device.type, first.dtype) is None:
            self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        else:
            self.optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=True)

    def step(self, grads: Sequence[Tensor]) -> None:
        """Take one step; ``grads`` match ``parameters``."""
        self.steps += 1
        if self.moments is None:
            for parameter, grad in zip(self.parameters, grads):
                parameter.grad = grad
            self.optimizer.step()
            return
        for parameter, grad, (mean, square) in zip(self.parameters, grads, self.moments):
            torch.ops.peft_kernels.prototype_adam_cpu.default(parameter, grad, mean, square, self.lr, self.steps)
