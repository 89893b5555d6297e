"""Where prompt and tokens stand in the result."""


def prompt_columns(virtual: int, insert_after_first: bool) -> slice:
    start = int(insert_after_first)
    return slice(start, start + virtual)


def token_columns(virtual: int, length: int, insert_after_first: bool) -> list[tuple[slice, slice]]:
    """Slices of the tokens, and those of the columns they go to."""
    first = int(insert_after_first)
    return [(slice(0, first), slice(0, first)), (slice(first, length), slice(first + virtual, virtual + length))]
