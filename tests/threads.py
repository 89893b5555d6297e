"""Work in several threads at once."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from accuracy import WithinRounding


def in_threads(count, work):
    """The results of ``work(number)``, for each number in a thread of its own that starts with the others; the first
    error is raised.
    """
    barrier = threading.Barrier(count)

    def run(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def assert_same_in_threads(function, arguments):
    """Assert that ``function`` of each argument, in threads of their own, is that of a single thread, within
    rounding: libraries may split a sum among as many threads as are free.
    """
    expected = [WithinRounding(lambda x=x: function(x)) for x in arguments]
    for bound, result in zip(expected, in_threads(len(arguments), lambda i: function(arguments[i]))):
        bound.check(result)


def objects_after(rounds, work, threads=4):
    """The numbers of objects and of tensors after as many rounds of threads that call ``work`` and end."""
    for _ in range(rounds):
        in_threads(threads, lambda number: work())
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(issubclass(type(x), torch.Tensor) for x in objects)
