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


def put_on(target: object, mixin: type[Swapped]) -> None:
    """Put ``mixin`` in front of the class of ``target`` and of all its mixins.

    Raises:
        RuntimeError: ``mixin`` is already on ``target``.
    """
    if isinstance(target, mixin):
        raise RuntimeError(f"{type(target).__name__} already has the mixin {mixin.__name__}")
    stock, mixins = _parts(type(target))
    _change(target, _swapped(stock, (mixin, *mixins)))


def take_off(target: object, mixin: type[Swapped]) -> None:
    """Take ``mixin`` off ``target``; mixins that were put on before or after it stay.

    Raises:
        RuntimeError: ``mixin`` is not on ``target``.
    """
    if not isinstance(target, mixin):
        raise RuntimeError(f"{type(target).__name__} has no mixin {mixin.__name__} to take off")
    _change(target, _without(type(target), mixin))


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
    # other code derived a class from ours: derive it again, without the methods that wrap the mixin's
    skipped = ("__dict__", "__weakref__")
    names = {k: v for k, v in vars(cls).items() if k not in skipped and not _wraps_inherited(cls, k, v)}
    return type(cls)(cls.__name__, tuple(_without(base, mixin) for base in cls.__bases__), names)


def _wraps_inherited(cls, name, value):
    wrapped = getattr(value, "__wrapped__", None)
    return wrapped is not None and wrapped is getattr(super(cls, cls), name, None)


def _change(target, cls):
    """Change the class of ``target`` and rebind the methods that other code stores on it, as accelerate does."""
    previous, target.__class__ = type(target), cls
    for name, value in vars(target).items():
        if not isinstance(value, MethodType) or value.__self__ is not target:
            continue
        if value.__func__ is getattr(previous, value.__name__, None):
            vars(target)[name] = MethodType(getattr(cls, value.__name__), target)


def _empty(stock, mixins):
    cls = _swapped(stock, mixins)
    return cls.__new__(cls)
