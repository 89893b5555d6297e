"""Triton's interpreter with checks that a GPU does not make, and with bfloat16. Every Triton test runs in it.

A launch that breaks one of these rules raises ``Fault``:

- Programs run in random order. No two programs write one element, no program reads an element that another one writes,
  and no two lanes of a store have one address.
- Every address is that of an element of the argument from which its pointer was derived; memory between the elements of
  a strided tensor does not count. Pointers are virtual until they are used: the upper bits number the argument, the
  lower ones are an offset.
- A lane that a mask switches off yields NaN or an extreme integer, unless the load has ``other``.

The interpreter keeps bfloat16 as uint16 and computes with these integers. Here it is float32, rounded whenever a value
is made.
"""

from collections import defaultdict
from functools import cache, reduce

import numpy as np
import torch

TAG, MIDDLE = 48, 1 << 47  # of a pointer: the first bit of the argument's number, and the offset of its first element

draws = np.random.default_rng(0)
launch = None


class Fault(AssertionError):
    pass


class Argument:
    """A tensor of a launch. ``elements``: the sorted offsets of its elements, or None if they fill its extent."""

    def __init__(self, tensor):
        self.text = f"{str(tensor.dtype)[6:]}{list(tensor.shape)} with strides {tensor.stride()}"
        self.address, self.size, self.storage = (
            tensor.data_ptr(),
            tensor.element_size(),
            tensor.untyped_storage().data_ptr(),
        )
        self.extent, self.elements = layout(tuple(tensor.shape), tensor.stride())

    def outside(self, offsets):
        """Returns which offsets, in elements, are not those of an element."""
        if self.elements is None:
            return (offsets < 0) | (offsets >= self.extent)
        return self.elements[np.searchsorted(self.elements, offsets).clip(max=len(self.elements) - 1)] != offsets


class Launch:
    """The arguments of one launch, and the addresses that its programs read and write, by storage."""

    def __init__(self, kernel):
        self.kernel, self.program, self.patched, self.arguments = kernel, None, set(), []
        self.reads, self.writes = defaultdict(list), defaultdict(list)

    def fault(self, text):
        return Fault(f"{self.kernel}: {text}")

    def add(self, tensor):
        """Returns the virtual address of an argument."""
        self.arguments.append(Argument(tensor))
        return (len(self.arguments) << TAG) + MIDDLE

    def access(self, pointers, mask, log):
        """Checks and logs the lanes that a mask leaves on. Returns the addresses of all lanes."""
        lanes = pointers.data[mask]
        if not lanes.size:
            return pointers.data
        number = int(lanes[0]) >> TAG
        if not 0 < number <= len(self.arguments):
            raise self.fault(f"program {self.program} follows a pointer that no argument gave")
        argument, start = self.arguments[number - 1], (number << TAG) + MIDDLE
        offsets, rest = np.divmod((lanes - np.uint64(start)).view(np.int64), argument.size)
        element_type = pointers.get_element_ty()
        if rest.any() or max(element_type.primitive_bitwidth // 8, 1) != argument.size:
            raise self.fault(
                f"program {self.program} reads or writes parts of elements of {argument.text} as {element_type}"
            )
        outside = argument.outside(offsets)
        if outside.any():
            raise self.fault(f"program {self.program} is outside of {argument.text}, at element {offsets[outside][0]}")
        log[argument.storage].append((self.program, argument.address + offsets * argument.size))
        return pointers.data + np.uint64((argument.address - start) % 2**64)

    def finish(self):
        """Checks that the programs do not depend on their order."""
        for storage, writes in self.writes.items():
            programs, writes = joined(writes)
            order = np.argsort(writes[1], kind="stable")
            stores, addresses = writes[:, order]
            same = addresses[1:] == addresses[:-1]
            if (same & (stores[1:] == stores[:-1])).any():
                raise self.fault("two lanes of a store have the same address")
            owners = programs[stores]
            if (clash := same & (owners[1:] != owners[:-1])).any():
                raise self.fault(f"programs {owners[1:][clash][0]} and {owners[:-1][clash][0]} write the same element")
            if reads := self.reads[storage]:
                programs, (loads, read) = joined(reads)
                writer = np.searchsorted(addresses, read).clip(max=len(addresses) - 1)
                if (clash := (addresses[writer] == read) & (owners[writer] != programs[loads])).any():
                    raise self.fault(
                        f"program {programs[loads][clash][0]} reads what program {owners[writer][clash][0]} writes"
                    )


def joined(log):
    """Returns the program of each access, and a column for each lane: the number of its access, and its address."""
    programs, addresses = zip(*log)
    numbers = np.repeat(np.arange(len(log)), [len(x) for x in addresses])
    return np.array(programs), np.stack((numbers, np.concatenate(addresses)))


@cache
def layout(shape, strides):
    """Returns the extent in elements, from the first to the last one, and their sorted offsets; None if all."""
    if 0 in shape:
        return 0, None
    steps = sorted((stride, size) for size, stride in zip(shape, strides) if size > 1 and stride)
    extent = 1 + sum(stride * (size - 1) for stride, size in steps)
    if extent == np.prod([size for _, size in steps], dtype=np.int64):
        return extent, None
    return extent, np.unique(reduce(np.add.outer, [stride * np.arange(size) for stride, size in steps]))


def extremes(shape, dtype):
    """Returns what a lane may hold that was not loaded."""
    if dtype.kind == "f":
        return np.full(shape, np.nan, dtype)
    if dtype.kind == "b":
        return draws.random(shape) < 0.5
    info = np.iinfo(dtype)
    return np.where(draws.random(shape) < 0.5, info.min, info.max).astype(dtype)


def rounded(x):
    """Rounds float32 to bfloat16, to nearest even."""
    bits = x.view(np.uint32)
    return np.where(
        np.isnan(x), x, ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    )


def to_bits(x):
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def from_bits(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def install():
    """Replaces parts of the interpreter of this process. It has to be the one that runs kernels: TRITON_INTERPRET=1."""
    import triton.language as tl
    from triton.runtime import interpreter

    from peft_kernels.ops import triton_runtime

    triton_runtime.INTERPRETED_DTYPES = triton_runtime.DTYPES
    bf16 = tl.bfloat16

    def replace(owner, name):
        """Decorator: a function that gets the one it replaces as its first argument."""
        original = getattr(owner, name)

        def wrap(function):
            setattr(owner, name, lambda *args, **kwargs: function(original, *args, **kwargs))

        return wrap

    def is_bf16(dtype):
        return dtype.scalar == bf16

    @replace(interpreter.GridExecutor, "__call__")
    def call(original, self, *args, **kwargs):
        global launch
        launch = Launch(self.fn.__name__)
        try:
            original(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            cause = error
            while isinstance(cause, interpreter.InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None
        launch.finish()

    @replace(interpreter, "_patch_lang")
    def patch_lang(
        original, fn
    ):  # for every call of a device function too: once is enough, and saves a third of the time
        modules = frozenset(id(x) for x in fn.__globals__.values() if x in (tl, tl.core)) if fn else None
        if modules in launch.patched:
            return None
        launch.patched.add(modules)
        return original(fn)

    @replace(interpreter, "_implicit_cvt")
    def implicit_cvt(original, argument):
        result = original(argument)
        if isinstance(argument, torch.Tensor):
            result.handle.data = np.array([launch.add(argument)], np.uint64)
        return result

    builder = interpreter.InterpreterBuilder

    @replace(builder, "set_grid_dim")
    def set_grid_dim(original, self, *sizes):
        launch.order = draws.permutation(int(np.prod(sizes)))
        original(self, *sizes)

    @replace(builder, "set_grid_idx")
    def set_grid_idx(original, self, *index):
        launch.program = int(launch.order[np.ravel_multi_index(index, self.grid_dim)])
        original(self, *map(int, np.unravel_index(launch.program, self.grid_dim)))

    @replace(builder, "create_masked_load")
    def load(original, self, pointers, mask, other, *rest):
        element_type = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element_type)
        addresses = launch.access(pointers, mask.data, launch.reads)
        filler = extremes(pointers.data.shape, dtype) if other is None else other.data
        if not is_bf16(element_type):
            return interpreter.TensorHandle(
                interpreter._interpreter.load(addresses, mask.data, filler, dtype), element_type
            )
        bits = interpreter._interpreter.load(addresses, mask.data, to_bits(filler), np.dtype(np.uint16))
        return interpreter.TensorHandle(from_bits(bits), element_type)

    @replace(builder, "create_masked_store")
    def store(original, self, pointers, value, mask, *rest):
        addresses = launch.access(pointers, mask.data, launch.writes)
        data = to_bits(value.data) if is_bf16(value.dtype) else value.data
        return interpreter._interpreter.store(addresses, data, mask.data)

    for name in ("create_atomic_cas", "create_atomic_rmw"):

        @replace(builder, name)
        def atomic(*_):
            raise launch.fault("an atomic operation: its result depends on the order of the programs")

    @replace(interpreter, "_get_np_dtype")
    def get_np_dtype(original, dtype):
        return np.dtype(np.float32) if is_bf16(dtype) else original(dtype)

    @replace(interpreter, "_validate_np_data_size")
    def validate_np_data_size(original, data, dtype):
        return original(data, tl.float32 if is_bf16(dtype) else dtype)

    @replace(interpreter.TensorHandle, "__post_init__")
    def post_init(original, self):
        original(self)
        if (
            is_bf16(self.dtype) and self.data.dtype == np.float32
        ):  # a comparison keeps the type of its operands, and has booleans
            self.data = rounded(self.data)

    @replace(builder, "cast_impl")
    def cast(original, self, source, target):
        if is_bf16(source.dtype) or is_bf16(target):
            return interpreter.TensorHandle(source.data.astype(interpreter._get_np_dtype(target)), target.scalar)
        return original(self, source, target)

    @replace(builder, "create_fp_to_fp")
    def fp_to_fp(original, self, source, target, rounding):
        return (
            self.cast_impl if is_bf16(source.dtype) or is_bf16(target) else lambda *x: original(self, *x, rounding)
        )(source, target)

    @replace(builder, "create_bitcast")
    def bitcast(original, self, source, target):
        if is_bf16(source.dtype) and not is_bf16(target):
            source = interpreter.TensorHandle(to_bits(source.data), tl.uint16)
        if is_bf16(target):
            return interpreter.TensorHandle(from_bits(source.data.view(np.uint16)), bf16)
        return original(self, source, target)

    @replace(builder, "create_fabs")
    def fabs(original, self, argument):
        return self.unary_op(argument, np.abs) if is_bf16(argument.dtype) else original(self, argument)
