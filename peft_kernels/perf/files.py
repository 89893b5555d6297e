"""Files and folders named by options: read, or tested for writing, before anything is measured."""

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def text_of(path: Path, option: str) -> str:
    """Read a UTF-8 text file.

    Raises:
        ValueError: the file cannot be read or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option}: {path} must be text in UTF-8, got byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from None
    except OSError as error:
        raise ValueError(f"{option}: cannot read {path}: {error.strerror}") from None
    if "\0" in text:
        raise ValueError(f"{option}: {path} must be text in UTF-8, got a byte of 0 at {text.index(chr(0))}")
    return text


def json_of(path: Path, option: str) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(text_of(path, option))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{option}: {path} must be JSON: {error}") from None


def writable_folder(folder: Path, option: str = "--out") -> Path:
    """Return ``folder`` if a trial write succeeds; folders made for the trial are removed again.

    Raises:
        ValueError: nothing can be written there.
    """
    made = []
    try:
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:  # a trial, because access rights are not the only obstacle
        raise ValueError(f"{option}: cannot write to {folder}: {error.strerror}") from None
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def writable_file(path: Path, option: str = "--out") -> Path:
    """Return ``path`` if it can be written.

    Raises:
        ValueError: it cannot be written.
    """
    writable_folder(path.parent, option)
    try:
        if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
            raise ValueError(f"{option}: cannot write {path}: {'a folder' if path.is_dir() else 'no permission'}")
    except OSError as error:
        raise ValueError(f"{option}: cannot write {path}: {error.strerror}") from None
    return path


def folder_or_hub_id(name: str, option: str) -> str:
    """Return ``name`` as transformers loads it. A name that can only be a path is not looked up on the hub.

    Raises:
        ValueError: a path without a folder, or an empty name.
    """
    path = Path(name)
    is_path = name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1
    if not name.strip() or (is_path and not path.is_dir()) or path.is_file():
        raise ValueError(
            f"{option}: expected a folder or the id of a model on the hub, got {name!r},"
            f" {'a file' if path.is_file() else 'no folder'}"
        )
    return name


def with_configuration(name: str, option: str) -> str:
    """Return ``name`` if transformers finds a configuration for it; does not import torch.

    Raises:
        ValueError: there is none; the message is transformers' own.
    """
    from transformers.utils import cached_file

    try:
        cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {str(error).partition(chr(10))[0]}") from error
    return name
