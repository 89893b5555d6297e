"""The columns of prompt and tokens in the result."""


def prompt_columns(virtual: int, insert_after_first: bool) -> slice:
    start = int(insert_after_first)
    return slice(start, start + virtual)


def token_columns(virtual: int, length: int, insert_after_first: bool) -> list[tuple[slice, slice]]:
    """Returns pairs of slices: tokens, and the columns of the result that they go to."""
    first = int(insert_after_first)
    return [(slice(0, first), slice(0, first)), (slice(first, length), slice(first + virtual, virtual + length))]
