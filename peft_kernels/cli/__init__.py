"""The entry point of ``peft-kernels``: names the packages to install if the command line's own are missing, and ends on
Ctrl-C.
"""

import signal
import sys
from importlib.util import find_spec

from ..perf.sigint import end_at_once

NEEDS = ("typer", "rich", "matplotlib", "jinja2", "transformers")


def app():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # until there are results to keep: an interrupted import may carry on in a broken state
        signal.signal(signal.SIGINT, end_at_once)
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        sys.exit(
            f'peft-kernels: {", ".join(missing)} not installed; the command line needs: pip install "peft_kernels[cli]"'
        )
    from .commands import app as commands

    commands()
