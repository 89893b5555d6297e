"""The tensors that an operator takes, declared once in the letters of its docstring, and the checks of them.

    ARGUMENTS = Arguments(
        hidden=Argument("B S H | B H", FLOATS),
        weight=Argument("V H", like="hidden"),
        label_ids=Argument("C w", INTEGERS, values="[-1, V)"),
        bias=Argument("V", like="hidden", or_float32=True, optional=True),
    )
    sizes = ARGUMENTS.check("label_logits", hidden, weight, label_ids, bias)  # sizes.B, sizes.V, ...
    if values_are_checked(hidden):
        ARGUMENTS.check_values("label_logits", label_ids=label_ids, V=sizes.V)

A letter has one size in a call. Rules that a declaration cannot express are plain code beside the call.

``check`` runs at every decoding step, where a loop over the declaration would take as long as a small operator. So it
is generated as straight-line Python, like ``__init__`` in ``dataclasses``. It only notices that an argument is wrong;
``Arguments.refuse`` finds out why.
"""

import linecache
import os
import re
from collections import namedtuple
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
FEW_VALUES = 64  # values up to which Python finds the least and the largest faster than a tensor function


class Argument(NamedTuple):
    """A tensor.

    shape: a letter or word for each dimension; ``|`` separates shapes of different numbers of dimensions.
    dtypes: the permitted dtypes; empty: any, or as ``like`` says.
    like: an argument declared before, whose dtype this one has.
    or_float32: float32 is permitted beside the dtype of ``like``.
    values: an interval from an integer to the size of a letter: ``"[-1, V)"`` or ``"[0, n]"``.
    at_least_1: a letter of the shape whose size must not be 0.
    optional: may be None.
    """

    shape: str
    dtypes: tuple[torch.dtype, ...] = ()
    like: str = ""
    or_float32: bool = False
    values: str = ""
    at_least_1: str = ""
    optional: bool = False

    def shapes(self) -> list[list[str]]:
        return [shape.split() for shape in self.shape.split("|")]


class Arguments:
    """The tensors of an operator, in the order in which they are checked. All are on the device of the first.

    ``check(operator, *tensors)`` takes all of them in this order and returns the sizes by letter; a size is None if no
    argument has the letter. It raises ValueError or TypeError.
    """

    def __init__(self, **declared: Argument):
        self.declared = declared
        self.intervals = [
            (name, int(low), letter, bracket)
            for name, argument in declared.items()
            for low, letter, bracket in re.findall(r"\[(-?\d+), (\w+)([])])", argument.values)
        ]
        letters = dict.fromkeys(letter for x in declared.values() for shape in x.shapes() for letter in shape)
        names: dict[str, Any] = {"PLAIN": (Tensor, torch.nn.Parameter), "supported": supported, "refuse": self.refuse}
        names |= {f"{name}_dtypes": argument.dtypes for name, argument in declared.items()}
        names |= {"Sizes": namedtuple("Sizes", letters), "float32": torch.float32}
        source, file = "\n".join(check_source(declared, letters)), f"<check of {', '.join(declared)}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # shown in tracebacks
        exec(compile(source, file, "exec"), names)
        self.check = names["check"]

    def check_values(self, operator: str, **tensors_and_sizes: Any) -> dict[str, list]:
        """Checks the declared intervals. The caller asks ``values_are_checked`` before.

        Returns the values that this reads, as nested lists: those of tensors of up to FEW_VALUES values.
        """
        lists = {}
        for name, low, letter, bracket in self.intervals:
            x = tensors_and_sizes.get(name)
            count = 0 if x is None else x.numel()
            if not count:
                continue
            if count <= FEW_VALUES:
                lists[name] = values = x.tolist()
                if x.ndim == 2:
                    values = [value for row in values for value in row]
                least, most = min(values), max(values)
            else:
                least, most = (int(value) for value in x.aminmax())
            end = tensors_and_sizes[letter]
            if least < low or most > end or (most == end and bracket == ")"):
                raise ValueError(
                    f"{operator}: {name} must lie in [{low}, {end}{bracket}, got values from {least} to {most}"
                )
        return lists

    def refuse(self, operator: str, name: str, *tensors: Any) -> NoReturn:
        """Raises what is wrong with the argument ``name``; those before it are right."""
        arguments = dict(zip(self.declared, tensors))
        argument, x, first = self.declared[name], arguments[name], next(iter(arguments))
        if not isinstance(x, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {x!r}")
        if hasattr(x, "placements"):
            raise TypeError(f"{operator}: {name} is a DTensor, which is not supported: pass its local tensor")
        if x.is_nested:
            raise ValueError(f"{operator}: {name} must be a dense tensor, got a nested tensor")
        dtypes = argument.dtypes
        expected = " or ".join(", ".join([str(dtype)[len("torch.") :] for dtype in dtypes]).rsplit(", ", 1))
        if argument.like:
            dtypes = (arguments[argument.like].dtype, torch.float32)[: 1 + argument.or_float32]
            expected = f"{dtypes[0]} like {argument.like}{', or float32' * argument.or_float32}"
        if dtypes and x.dtype not in dtypes:
            raise TypeError(f"{operator}: {name} must be {expected}, got {x.dtype}")
        if x.device != tensors[0].device:
            raise ValueError(f"{operator}: {name} must be on {tensors[0].device} like {first}, got {x.device}")
        known: dict[str, tuple[int, str]] = {}  # letter -> its size, and the first argument that has it
        for owner, t in zip(self.declared, tensors):
            if owner == name:
                break
            for letters in self.declared[owner].shapes():
                if t is not None and t.ndim == len(letters):
                    known = {letter: (size, f"{owner} {sizes(t)}") for letter, size in zip(letters, sizes(t))} | known
        shapes, others = [], {}
        for letters in argument.shapes():
            filled = [str(known[letter][0]) if letter in known else letter for letter in letters]
            shapes.append(f"({', '.join(filled)}{',' * (len(filled) == 1)})")
            others |= dict.fromkeys([known[letter][1] for letter in letters if letter in known])
        expected = " or ".join(shapes)
        expected += f" with {argument.at_least_1} at least 1" if argument.at_least_1 else ""
        expected += f" for {' and '.join(others)}" if others else ""
        raise ValueError(f"{operator}: {name} must be {expected}, got {sizes(x)}")


def values_are_checked(x: Tensor) -> bool:
    """Returns whether values may be read: on the CPU always; elsewhere, where that synchronizes with the device, only
    with ``PEFT_KERNELS_DEBUG=1``.
    """
    return x.is_cpu or os.environ.get("PEFT_KERNELS_DEBUG") == "1"


def sizes(x: Tensor) -> tuple[int, ...]:
    """Returns the shape of ``x``, in numbers also under torch.compile, where sizes are symbols."""
    return tuple(len(range(size)) for size in x.shape)


def supported(x: Any) -> bool:
    """Returns whether ``x``, which is no plain tensor or parameter, is supported: a fake tensor, ..."""
    return isinstance(x, Tensor) and not hasattr(x, "placements") and not x.is_nested


def check_source(declared: dict[str, Argument], letters: Iterable[str]) -> Iterator[str]:
    """Yields the lines of ``check``."""
    yield f"def check(operator, {', '.join(declared)}):"
    yield f"    {' = '.join(f'size_{letter}' for letter in letters)} = None"
    for position, (name, argument) in enumerate(declared.items()):
        refuse, indent, shapes = f"refuse(operator, {name!r}, {', '.join(declared)})", "    ", argument.shapes()
        if argument.optional:
            yield f"    if {name} is not None:"
            indent += "    "
        yield f"{indent}if type({name}) not in PLAIN and not supported({name}): {refuse}"
        for shape in shapes:
            branch = indent
            if len(shapes) > 1:
                yield f"{indent}else:" if shape is shapes[-1] else f"{indent}if {name}.ndim == {len(shape)}:"
                branch += "    "
            yield f"{branch}try: ({' '.join(f'{name}_{i},' for i, _ in enumerate(shape))}) = {name}.shape"
            yield f"{branch}except (ValueError, RuntimeError): {refuse}"  # another number of dimensions; nested
            for i, letter in enumerate(shape):
                yield f"{branch}if size_{letter} is not None and size_{letter} != {name}_{i}: {refuse}"
                if letter == argument.at_least_1:
                    yield f"{branch}if {name}_{i} < 1: {refuse}"
                yield f"{branch}size_{letter} = {name}_{i}"
        yield f"{indent}{name}_dtype = {name}.dtype"
        if argument.like:
            float32 = f" and {name}_dtype != float32" * argument.or_float32
            yield f"{indent}if {name}_dtype != {argument.like}_dtype{float32}: {refuse}"
        elif argument.dtypes:
            yield f"{indent}if {name}_dtype not in {name}_dtypes: {refuse}"
        yield f"{indent}if {name}.device != device: {refuse}" if position else f"    device = {name}.device"
    yield f"    return Sizes({', '.join(f'size_{letter}' for letter in letters)})"
