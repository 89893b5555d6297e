"""``python -m peft_kernels`` is ``peft-kernels``, in a source tree that is not installed too."""

from .cli import app

app()
