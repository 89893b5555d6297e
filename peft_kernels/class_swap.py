"""Behaviour put onto one object of a class, and taken off again.

The object gets a class made for it, which comes before its own and passes for it: transformers looks at names, modules and bases.
"""

from functools import cache


class Swapped:
    """Base of what is put on. Copies and pickles keep it: the class is made again from its parts."""

    def __reduce_ex__(self, protocol):
        stock, mixins = _parts(type(self))
        return _empty, (stock, mixins), self.__dict__


def put_on(thing: object, mixin: type[Swapped]) -> None:
    stock, mixins = _parts(type(thing))
    thing.__class__ = _swapped(stock, (mixin, *mixins))


def take_off(thing: object, mixin: type[Swapped]) -> None:
    """Whatever else was put on stays.

    Raises:
        RuntimeError: the class of ``thing`` has been changed by others since.
    """
    stock, mixins = _parts(type(thing))
    if mixin not in mixins:
        raise RuntimeError(f"what was put onto {type(thing).__name__} after {mixin.__name__} has to be taken off before it")
    thing.__class__ = _swapped(stock, tuple(m for m in mixins if m is not mixin))


def _parts(cls):
    """The class as it was, and what was put onto it."""
    return cls.__dict__.get("_swapped_from", (cls, ()))


@cache  # one class for all layers of a model
def _swapped(stock, mixins):
    if not mixins:
        return stock
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "_swapped_from": (stock, mixins)}
    return type(stock.__name__, (*mixins, stock), names)


def _empty(stock, mixins):
    cls = _swapped(stock, mixins)
    return cls.__new__(cls)
