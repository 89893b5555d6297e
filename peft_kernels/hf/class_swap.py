"""Mixins that are put onto one object and taken off again.

The object gets a derived class with the name and module of its own class, because transformers inspects names, modules
and bases. Several mixins stack in the order in which they were put on and come off in any order, even if other code has
changed the class in between (FSDP2 derives a class of its own).
"""

from functools import cache
from types import MethodType


class Swapped:
    """Base class of the mixins. Copies and pickles keep the mixins: the derived class is rebuilt from its parts."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _empty, _parts(type(self)), *state


def put_on(thing: object, mixin: type[Swapped]) -> None:
    """Put ``mixin`` in front of the class of ``thing`` and of all its mixins.

    Raises:
        RuntimeError: ``mixin`` is already on ``thing``.
    """
    if isinstance(thing, mixin):
        raise RuntimeError(f"{mixin.__name__} is on {type(thing).__name__} already")
    stock, mixins = _parts(type(thing))
    _change(thing, _swapped(stock, (mixin, *mixins)))


def take_off(thing: object, mixin: type[Swapped]) -> None:
    """Take ``mixin`` off ``thing``; mixins that were put on before or after it stay.

    Raises:
        RuntimeError: ``mixin`` is not on ``thing``.
    """
    if not isinstance(thing, mixin):
        raise RuntimeError(f"{mixin.__name__} must be on {type(thing).__name__} to be taken off, and is not")
    _change(thing, _without(type(thing), mixin))


def _parts(cls):
    """The original class, and the mixins that were put onto it."""
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
    # other code derived a class from ours: derive it again, without methods that a base put into it by wrapping the
    # mixin's
    names = {
        k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__") and not _wraps_inherited(cls, k, v)
    }
    return type(cls)(cls.__name__, tuple(_without(base, mixin) for base in cls.__bases__), names)


def _wraps_inherited(cls, name, value):
    wrapped = getattr(value, "__wrapped__", None)
    return wrapped is not None and wrapped is getattr(super(cls, cls), name, None)


def _change(thing, cls):
    """Change the class of ``thing`` and rebind methods that other code stores on it (accelerate stores ``forward``)."""
    before, thing.__class__ = type(thing), cls
    for name, value in vars(thing).items():
        if (
            isinstance(value, MethodType)
            and value.__self__ is thing
            and value.__func__ is getattr(before, value.__name__, None)
        ):
            vars(thing)[name] = MethodType(getattr(cls, value.__name__), thing)


def _empty(stock, mixins):
    cls = _swapped(stock, mixins)
    return cls.__new__(cls)
