"""A progress bar that does not disturb the timed runs."""

import time
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

DRAWN_EVERY = 0.2  # seconds


@contextmanager
def progress_bar(console: Console, total: int):
    """Yield ``step(label, done=None)``: shows what runs next, with ``done`` of ``total`` completed, or one more than
    before.

    It draws only when called, and at most every ``DRAWN_EVERY`` seconds: a drawing thread would take time from the
    timed runs.
    """
    columns = SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task, drawn = progress.add_task("warming up", total=total), 0.0

        def step(label: str, done: float | None = None):
            nonlocal drawn
            refresh = (now := time.monotonic()) - drawn > DRAWN_EVERY
            if done is None:
                progress.update(task, description=escape(label), advance=1, refresh=refresh)
            elif refresh:
                progress.update(task, description=escape(label), completed=done, refresh=True)
            if refresh:
                drawn = now

        yield step
