"""Files and folders that options name: read, or tried, before anything is measured."""

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def text_of(path: Path, option: str) -> str:
    """
    Raises:
        ValueError: no text in UTF-8, or nothing that can be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {path} must be text in UTF-8, got byte 0x{error.object[error.start]:02x} at {error.start}") from None
    except OSError as error:
        raise ValueError(f"{option}: cannot read {path}: {error.strerror}") from None
    if "\0" in text:
        raise ValueError(f"{option}: {path} must be text in UTF-8, got a byte of 0 at {text.index(chr(0))}")
    return text


def json_of(path: Path, option: str) -> Any:
    """
    Raises:
        ValueError: no JSON.
    """
    try:
        return json.loads(text_of(path, option))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{option}: {path} must be JSON: {error}") from None


def writable_folder(folder: Path, option: str = "--out") -> Path:
    """``folder``, into which a file can be written; it is made when there is one.

    Raises:
        ValueError: nothing can be written there.
    """
    made = []
    try:
        made = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:  # tried, because access rights are not all that can stand against it
        raise ValueError(f"{option}: cannot write to {folder}: {error.strerror}") from None
    finally:
        for one in made:
            with suppress(OSError):
                one.rmdir()


def writable_file(path: Path, option: str = "--out") -> Path:
    """
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
    """What transformers loads. What can only be a path is not looked for on a hub.

    Raises:
        ValueError: a path without a folder, or no name at all.
    """
    path = Path(name)
    is_path = name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1
    if not name.strip() or (is_path and not path.is_dir()) or path.is_file():
        raise ValueError(f"{option}: expected a folder or the id of a model on the hub, got {name!r}, {'a file' if path.is_file() else 'no folder'}")
    return name


def with_configuration(name: str, option: str) -> str:
    """What transformers finds a configuration of, which is looked for without torch.

    Raises:
        ValueError: there is none, in transformers' words.
    """
    from transformers.utils import cached_file

    try:
        cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {str(error).partition(chr(10))[0]}") from error
    return name
