"""Launch configurations for the GPU at hand: `peft-kernels tune`."""
