"""Comparison of an implementation below the operator with a plain PyTorch implementation of the same operator."""

import torch
from accuracy import WithinRounding
from torch.utils._pytree import tree_leaves, tree_map_only


def widened(arguments):
    """Convert floating-point tensors to float64."""
    return tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, arguments)


def expected_of(function, plain, *arguments):
    """The expected result of ``function(implementation, *arguments)``: within rounding of ``plain``, measured from
    float64.
    """
    return WithinRounding(lambda: function(plain, *arguments), function(plain, *widened(arguments)))


def assert_like(plain, implementation, function, *arguments):
    """Assert that ``function(implementation, *arguments)`` equals ``plain``'s result, with its dtypes and its None;
    returns it.
    """
    got = function(implementation, *arguments)
    expected = tree_leaves(function(plain, *arguments))
    assert [getattr(x, "dtype", x) for x in tree_leaves(got)] == [getattr(x, "dtype", x) for x in expected]
    if any(isinstance(x, torch.Tensor) for x in expected):
        expected_of(function, plain, *arguments).check(got)
    return got
