"""The points to measure, from the options."""

from collections.abc import Mapping, Sequence

import typer

LARGEST = 1 << 20
AXES = {"batch": "--batch", "streams": "--streams", "length": "--length", "new_tokens": "--new-tokens"}


def parsed(options: Mapping[str, Sequence[str] | None]) -> dict[str, tuple[int, ...]]:
    """Values for the axes that the command line names.

    Raises:
        typer.BadParameter: a value that is not a positive integer.
    """
    return {axis: _values(axis, texts) for axis, texts in options.items() if texts}


def sizes_of(
    options: Mapping[str, tuple[int, ...]], defaults: Mapping[str, int], method: str
) -> dict[str, tuple[int, ...]]:
    """Values of every axis of a method: those from the command line, or the default.

    Raises:
        typer.BadParameter: an axis that the method does not have.
    """
    for axis in options:
        if axis not in defaults:
            has = ", ".join(map(AXES.get, defaults))
            raise typer.BadParameter(f"does not apply to {method}, which has {has}", param_hint=AXES[axis])
    return {axis: options.get(axis, (default,)) for axis, default in defaults.items()}


def points(sizes: Mapping[str, tuple[int, ...]]) -> list[dict[str, int]]:
    """The points of the sweep: each axis with several values varies in turn, with the others at their first value."""
    base = {axis: values[0] for axis, values in sizes.items()}
    return [base, *({**base, axis: value} for axis, values in sizes.items() for value in values[1:])]


def _values(axis: str, texts: Sequence[str]) -> tuple[int, ...]:
    words = [word.strip() for text in texts for word in text.split(",")]
    if not all(word.isdecimal() and len(word) <= len(str(LARGEST)) and 0 < int(word) <= LARGEST for word in words):
        what = f"expected positive integers with commas between them, at most {LARGEST:,}"
        raise typer.BadParameter(f"{what}, got {','.join(words)!r}", param_hint=AXES[axis])
    return tuple(dict.fromkeys(int(word) for word in words))
