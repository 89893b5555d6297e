"""Behaviour put onto one object of a class, and taken off again.

The object gets a class made for it, which comes before its own and passes for it: transformers looks at names, modules and bases. Several
mixins lie on one object in the order in which they were put on, and come off in any order, also where others have changed the class since
(FSDP2 derives a class of its own).
"""

from functools import cache
from types import MethodType


class Swapped:
    """Base of what is put on. Copies and pickles keep it: the class is made again from its parts."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _empty, _parts(type(self)), *state


def put_on(thing: object, mixin: type[Swapped]) -> None:
    """``mixin`` comes before everything else that ``thing`` has.

    Raises:
        RuntimeError: it is on already.
    """
    if isinstance(thing, mixin):
        raise RuntimeError(f"{mixin.__name__} is on {type(thing).__name__} already")
    stock, mixins = _parts(type(thing))
    _change(thing, _swapped(stock, (mixin, *mixins)))


def take_off(thing: object, mixin: type[Swapped]) -> None:
    """Whatever else was put on, before or after, stays.

    Raises:
        RuntimeError: ``mixin`` is not on ``thing``.
    """
    if not isinstance(thing, mixin):
        raise RuntimeError(f"{mixin.__name__} must be on {type(thing).__name__} to be taken off, and is not")
    _change(thing, _without(type(thing), mixin))


def _parts(cls):
    """The class as it was, and what was put onto it."""
    return cls.__dict__.get("_swapped_from", (cls, ()))


@cache  # one class for all layers of a model
def _swapped(stock, mixins):
    if not mixins:
        return stock
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "_swapped_from": (stock, mixins)}
    return type(stock.__name__, (*mixins, stock), names)


@cache
def _without(cls, mixin):
    if not issubclass(cls, mixin):
        return cls
    stock, mixins = _parts(cls)
    if mixins:
        return _swapped(_without(stock, mixin), tuple(m for m in mixins if m is not mixin))
    # derived by others from a class of ours: derived again, without what a base has put into its subclass by wrapping the mixin's method
    names = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__") and not _wraps_inherited(cls, k, v)}
    return type(cls)(cls.__name__, tuple(_without(base, mixin) for base in cls.__bases__), names)


def _wraps_inherited(cls, name, value):
    wrapped = getattr(value, "__wrapped__", None)
    return wrapped is not None and wrapped is getattr(super(cls, cls), name, None)


def _change(thing, cls):
    """Bound methods that others keep on ``thing`` (accelerate keeps ``forward``) become those of the new class."""
    before, thing.__class__ = type(thing), cls
    for name, value in vars(thing).items():
        if isinstance(value, MethodType) and value.__self__ is thing and value.__func__ is getattr(before, value.__name__, None):
            vars(thing)[name] = MethodType(getattr(cls, value.__name__), thing)


def _empty(stock, mixins):
    cls = _swapped(stock, mixins)
    return cls.__new__(cls)
