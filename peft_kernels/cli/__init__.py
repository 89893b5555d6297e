"""The entry point of ``peft-kernels``: says what to install where the command line's own packages are missing; ends on Ctrl-C."""

import signal
import sys
from importlib.util import find_spec

from ..perf.sigint import end_at_once

NEEDS = ("typer", "rich", "matplotlib", "jinja2", "transformers")


def app():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)  # until there is something to keep: an import that is broken off may go on, wrong
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        sys.exit(f'peft-kernels: {", ".join(missing)} not installed; the command line needs: pip install "peft_kernels[cli]"')
    from .commands import app as commands

    commands()
