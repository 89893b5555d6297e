"""Ctrl-C and errors after a measurement: results are written before the run ends."""

import signal
from collections.abc import Sized

import typer
from rich.console import Console

from .sigint import INTERRUPTED, end_at_once


class Keeping:
    """Postpones the end of a run that has ``results``.

    with Keeping(rows) as kept:
        rows.append(...)
    write(rows, partial=kept.partial)
    kept.end(console)
    """

    def __init__(self, results: Sized):
        self.results, self.stop = results, None

    def __enter__(self):
        if signal.getsignal(signal.SIGINT) is end_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(self, kind, stop, trace) -> bool:
        self.stop = stop
        return stop is not None and len(self.results) > 0

    @property
    def partial(self) -> bool:
        return self.stop is not None

    def end(self, console: Console) -> None:
        """End the run if it was interrupted.

        Raises:
            typer.Exit: the run was interrupted by Ctrl-C; any other error that stopped it is raised again.
        """
        if isinstance(self.stop, KeyboardInterrupt):
            console.print("[yellow]interrupted: what was written is partial[/yellow]")
            raise typer.Exit(INTERRUPTED)
        if self.stop is not None:
            raise self.stop
