"""Files that are whole or not there: written beside their place, flushed to disk, then renamed."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` makes a file at the path that it is given; that file then takes the place of ``path``. Processes may do this at once.

    A stopped run, even one of a machine that loses power, leaves the file of before or the new one.
    """
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems have no such call for folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_writable(what: str, path: Path) -> None:
    """Makes the folder of ``path``.

    Raises:
        ValueError: no file can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
        part.touch()
        part.unlink()
    except OSError as error:
        raise ValueError(f"{what} must be a path that can be written, got {str(path)!r}: {error}") from error
