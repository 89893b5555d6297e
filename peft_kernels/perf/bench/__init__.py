"""Operators against their baselines: `peft-kernels bench`."""
