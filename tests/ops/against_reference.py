"""Comparison of an implementation below the operator with a plain PyTorch implementation of the same operator, and of
an operator with its formula.
"""

import torch
from accuracy import WithinRounding, assert_within_rounding
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


def results(function, leaves, rest, dtype, frozen=(), **options):
    """Results of ``function(*leaves, *rest, **options)``, then the gradients of ``leaves``, or zeros.

    Args: dtype: that of the results' gradients, which are random. frozen: the indices of leaves without a gradient.
    """
    leaves = [x if x is None else x.detach().requires_grad_(i not in frozen) for i, x in enumerate(leaves)]
    outs = function(*leaves, *rest, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(dtype).to(out) for out in outs]
    if outs[0].requires_grad:  # False for some formulas without rows
        torch.autograd.backward(outs, grads)
    gradients = [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves if x is not None]
    return [*(out.detach() for out in outs), *gradients]


def compare(function, formula, leaves, *rest, out_dtype=None, **options):
    """Assert that results and gradients are those of ``formula`` within the rounding of the first leaf's dtype, and
    have the dtypes of their leaves; returns them. ``out_dtype``: that of the first result, if it is not the first
    leaf's.
    """
    dtype = leaves[0].dtype
    got = results(function, leaves, rest, dtype, **options)
    dtypes = [x.dtype for x in leaves if x is not None]
    assert got[0].dtype == (out_dtype or dtype) and [x.dtype for x in got[-len(dtypes) :]] == dtypes
    narrow = tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (leaves, rest))
    truth = None if dtype == torch.float64 else results(formula, *widened((leaves, rest)), dtype, **options)
    assert_within_rounding(got, lambda: results(formula, *narrow, dtype, **options), truth)
    return got
