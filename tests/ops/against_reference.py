"""An implementation below the operator, held against another one of the same operator that is written in plain PyTorch."""

import torch
from accuracy import WithinRounding
from torch.utils._pytree import tree_leaves, tree_map_only


def widened(arguments):
    """Floating point tensors in float64."""
    return tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, arguments)


def expected_of(function, plain, *arguments):
    """What ``function(implementation, *arguments)`` has to give: within rounding of ``plain``, measured from float64."""
    return WithinRounding(lambda: function(plain, *arguments), function(plain, *widened(arguments)))


def assert_like(plain, implementation, function, *arguments):
    """``function(implementation, *arguments)`` is what ``plain`` gives, None where that gives None, in its dtypes. Returns it."""
    got = function(implementation, *arguments)
    expected = tree_leaves(function(plain, *arguments))
    assert [getattr(x, "dtype", x) for x in tree_leaves(got)] == [getattr(x, "dtype", x) for x in expected]
    if any(isinstance(x, torch.Tensor) for x in expected):
        expected_of(function, plain, *arguments).check(got)
    return got
