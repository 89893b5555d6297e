"""The entry point of ``peft-kernels``: says what to install where the command line's own packages are missing."""

import sys
from importlib.util import find_spec

NEEDS = ("typer", "rich", "matplotlib", "jinja2", "transformers")


def app():
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        sys.exit(f'peft-kernels: {", ".join(missing)} not installed; the command line needs: pip install "peft_kernels[cli]"')
    from .commands import app as commands

    commands()
