"""The packages of the extra ``hf``, which the methods need but the operators do not."""

from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = ("transformers", "peft", "safetensors", "numpy", "filelock")


@contextmanager
def needed_by(method: str) -> Iterator[None]:
    """Context for the imports of a method, with a helpful error where a package is missing.

    Raises:
        ImportError: one of PACKAGES is not installed; the message names the command that installs them.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        command = 'pip install "peft_kernels[hf]"'
        raise ImportError(
            f"peft_kernels.{method} needs {error.name}, which is not installed: {command}", name=error.name
        ) from error
