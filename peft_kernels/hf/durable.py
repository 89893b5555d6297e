"""Atomic file writes: to a temporary file in the same folder, flushed to disk, then renamed."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Replace ``path`` atomically with the file that ``write(temporary_path)`` creates.

    An interruption, even a loss of power, leaves either the old file or the new one. Concurrent processes may replace
    the same file.
    """
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems cannot fsync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_writable(argument: str, path: Path) -> None:
    """Create the folder of ``path`` and check that a file can be written in it.

    Raises:
        ValueError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
        part.touch()
        part.unlink()
    except OSError as error:
        raise ValueError(f"{argument} must be a path that can be written, got {str(path)!r}: {error}") from error
