"""Lets ``FlopCounterMode`` count the matmuls of the operators, as it counts those of PyTorch's own: by shapes, padding included.

``hf/when_imported.py`` imports this module beside ``torch.utils.flop_counter``, which imports Triton.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from .registry import declared

for module in declared("cost").values():
    for name, formula in getattr(module, "FLOPS", {}).items():
        register_flop_formula(getattr(torch.ops.peft_kernels, name))(formula)
