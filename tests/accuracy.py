"""Comparison within rounding, for all tests. No test has a tolerance of its own.

Floating-point addition is not associative, so two machines, two thread counts or two addresses give two results of one
formula, and one run of plain PyTorch is one sample of them. The bounds here come from many samples: the formula is run
again with every operation's result perturbed at random by as much as its rounding may be, and every sum's terms by as
much as an unlucky summation order may change them (Monte Carlo arithmetic: Parker, 1997). The scatter of these runs is
eps times the sum of the absolute terms, propagated through the whole computation: it accounts for cancellation, depth,
gradients and magnitudes, and no test needs a number. Plain PyTorch's error is the second source: with a ``truth`` in
float64, the deviations of the runs are taken from it, so that the runs' own rounding counts.

The result of one operation is multiplied by a factor within 1 +- eps/2, as rounding to nearest does. In a sequential
sum of n terms, a term goes through n/2 additions on average, each of which rounds within eps/2; independent roundings
add up as a random walk, so the term is perturbed by eps/2 * sqrt(n/2). The sequential order is the longest: vectors,
blocks, trees and threads only shorten it. Dtypes narrower than float32 are summed in float32, so their terms are not
perturbed. Gathering, copying, comparing and changing signs do not round.

The bound, on the Euclidean norm of each group of at least 16 numbers (rows of the last dimension, or of more dimensions
if it is shorter):

    |got - expected| <= FACTOR * (1 + 8 / draws) * (scatter of the group + that of all groups) + eps * |expected|

FACTOR = 2: at most twice plain PyTorch's error, as CONTRIBUTING.md requires of a kernel. Without a truth ``expected``
is a run with rounding of its own, and the difference of two runs is sqrt(2) times the error of one: the factor is
multiplied by sqrt(2). The root mean square of the nonzero group scatters is added because another order of evaluation
rounds in other places: if one cancels exactly (the gradient of a softmax over one key), another leaves the rounding of
the terms that it subtracts. For numbers of uniform magnitude this doubles the group's own scatter, which accounts for
the rounding on both sides. A tensor that is exactly 0 in every run must be 0. ``draws`` is the number of runs times the
numbers in the group: a deviation estimated from few numbers may be too small, and for 4 numbers one in thousands
exceeds three times the factor (Student's t). eps * |expected| is half a unit in the last place on each side: if nothing
else rounds, as in a copy or one addition, the scatter is 0.

Bit-equality (``torch.equal``) is for results that promise it: one call twice, ``disable`` after ``enable``, parameters.
Tokens are compared bit by bit too, and ``assert_no_near_tie`` shows that rounding cannot decide them.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path

__all__ = [
    "FACTOR",
    "Rounding",
    "WithinRounding",
    "assert_no_near_tie",
    "assert_same_tokens",
    "assert_within_rounding",
    "scatter_of",
]

FACTOR = 2
RUNS = 4
GROUP = 16  # least numbers in a group, if the tensor has as many
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}
# MoE experts count their tokens in floats
INTEGERS = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
}
EXACT = {  # operations that do not round
    "_to_copy", "_unsafe_index", "abs", "amax", "amin", "bernoulli", "bernoulli_", "cat", "ceil", "clamp", "clamp_min",
    "clone",
    "constant_pad_nd", "copy", "copy_", "embedding", "eq", "exponential_", "fill", "fill_", "flip", "floor", "gather",
    "ge", "gt",
    "histc", "index", "index_copy_", "index_fill", "index_select", "le", "lift_fresh", "lt", "masked_fill",
    "masked_fill_",
    "masked_scatter", "max", "maximum", "min", "minimum", "multinomial", "nan_to_num", "native_dropout_mask", "ne",
    "neg", "normal_",
    "pad", "relu", "relu_", "repeat", "roll", "round", "scatter", "select_backward", "select_scatter", "sign",
    "slice_backward",
    "slice_scatter", "sort", "stack", "threshold_backward", "topk", "tril", "triu", "uniform_", "unsafe_split",
    "where", "zero_",
}  # fmt: skip


class Rounding(TorchDispatchMode):
    """Context in which operations round differently, each in its result's dtype, by ``times`` as much as it may.

    It sees the operations below autograd, including those of a backward pass. The draws depend on ``seed`` alone and do
    not touch PyTorch's generators. ``dtype``: a narrower dtype; the operands and results of matmuls round to it, and
    nothing else rounds, as under autocast.
    """

    def __init__(self, seed: int = 0, times: float = 1.0, dtype: torch.dtype | None = None):
        super().__init__()
        self.seed, self.times, self.dtype, self.generators = seed, times, dtype, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        how = None if kwargs.get("dtype") in INTEGERS else _how(function)
        operands = [] if how is None else _floats((*args, *kwargs.values()))
        if not operands or self.dtype is not None and how not in ("product", "attention"):
            return function(*args, **kwargs)
        if how != "each":
            of_product = how == "product" and operands[-2].ndim
            terms = operands[-2].shape[-1] if of_product else max((n for x in operands for n in x.shape), default=1)
            if terms > 1:
                roundings = math.sqrt(terms / 2) if self.dtype is None else 1
                moved = lambda x: self.moved(x, roundings) if _is_float(x) and x.element_size() >= 4 else x  # noqa: E731
                shallow = lambda x: [moved(y) for y in x] if isinstance(x, (list, tuple)) else moved(x)  # noqa: E731
                args, kwargs = [shallow(x) for x in args], {name: shallow(x) for name, x in kwargs.items()}
        out = function(*args, **kwargs)
        for x in _floats((out,)):
            if x.numel():
                x.copy_(self.moved(x, 1))
        return out

    def moved(self, x, roundings):
        """``x`` times 1 +- eps/2 * ``roundings``; numbers near the end of the range, which masks use for infinity, do
        not change.
        """
        if x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        info, wide, eps = (
            torch.finfo(x.dtype),
            torch.promote_types(x.dtype, torch.float32),
            torch.finfo(self.dtype or x.dtype).eps,
        )
        draw = torch.empty(x.shape, device=x.device, dtype=wide).uniform_(-1, 1, generator=self.generators[x.device])
        moved = x.to(wide).addcmul(x.to(wide), draw, value=self.times * eps / 2 * roundings).to(x.dtype)
        return torch.where(x.abs() < info.max / 4, moved, x)


@functools.cache
def _how(function) -> str | None:
    """Where an operator rounds: "each" result, in the sums of a "product" or of "attention", in other "sums", or
    nowhere (None).
    """
    name, schema = function.overloadpacket.__name__, function._schema
    if name in EXACT or any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return None
    if torch.Tag.pointwise in function.tags or any(
        a.alias_info is not None and a.alias_info.is_write for a in schema.arguments
    ):
        return "each"
    return "product" if name in PRODUCTS else "attention" if "scaled_dot_product" in name else "sums"


class WithinRounding:
    """The expected result of ``function()``, up to rounding; one object checks any number of results.

    Args:
        function: the formula in plain PyTorch in the dtype whose rounding counts (the kernel's); or the stock model,
            with which another order of evaluation is compared. It is called several times, without arguments, under
            ``Rounding``, and computes gradients itself. Results are tensors, or lists, tuples, dictionaries or model
            outputs of them.
        truth: the same results in float64. Without it results are compared with ``function()`` itself.
        runs: number of runs under ``Rounding``. Fewer take less time and widen the bound of small groups, through
            ``draws``.
        dtype: a narrower dtype, to which matmuls may round, as under autocast; ``function()`` itself is the truth then.
    """

    def __init__(self, function: Callable, truth=None, runs: int = RUNS, dtype: torch.dtype | None = None):
        self.expected = _leaves(function() if truth is None else truth)
        self.factor = FACTOR * (1 if truth is not None or dtype is not None else math.sqrt(2))
        self.samples = [_leaves(x) for x in scatter_of(function, runs, dtype=dtype)]
        self.eps = 0.0 if dtype is None else torch.finfo(dtype).eps
        assert list(self.expected) == list(self.samples[0]), "function and truth must return the same"

    def check(self, got, partial: bool = False) -> None:
        """Assert that ``got`` is within the bound. Shapes must agree, dtypes need not. Non-finite numbers must be the
        same on both sides. Integers must be equal, in all runs. ``partial``: leaves may be missing.
        """
        got = _leaves(got)
        assert got and (got.keys() <= self.expected.keys() if partial else got.keys() == self.expected.keys()), (
            f"expected {list(self.expected)}, got {list(got)}"
        )
        for name, mine in got.items():
            _assert_leaf(
                name, mine, self.expected[name], [sample[name] for sample in self.samples], self.factor, self.eps
            )


def assert_within_rounding(got, function: Callable, truth=None, **options) -> None:
    """Shorthand for ``WithinRounding(function, truth, **options).check(got)``."""
    WithinRounding(function, truth, **options).check(got)


def scatter_of(function: Callable, runs: int = RUNS, times: float = 1.0, dtype: torch.dtype | None = None) -> list:
    """The results of ``function()`` under ``runs`` different roundings."""
    results = []
    for seed in range(runs):
        with Rounding(seed, times, dtype):
            results.append(function())
    return results


def assert_no_near_tie(function: Callable, expected: torch.Tensor, times: float = 16.0, rounding=None) -> None:
    """Assert that ``function()`` gives the same tokens when everything rounds ``times`` as much: no summation order
    decides one.

    A failure here is not about the code under test: the test's seed, scale or dtype has to change. ``rounding``: a
    context that perturbs numbers as much as ``Rounding`` and costs less.
    """
    with rounding or Rounding(times=times):
        tokens = function()
    assert torch.equal(tokens, expected), (
        f"near-tie: rounding decides the tokens, {tokens.tolist()} or {expected.tolist()}"
    )


def assert_same_tokens(got: torch.Tensor, function: Callable) -> None:
    """Assert that ``got`` are the tokens of ``function()``, and that rounding decides none of them."""
    expected = function()
    assert torch.equal(got, expected), f"got {got.tolist()}, expected {expected.tolist()}"
    assert_no_near_tie(function, expected)


def _is_float(x) -> bool:
    # oneDNN's packed weights cannot be perturbed
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.layout == torch.strided


def _floats(values) -> list:
    """The floating-point tensors in ``values`` and in lists in it."""
    flat = (y for x in values for y in (x if isinstance(x, (list, tuple)) else (x,)))
    return [x for x in flat if _is_float(x)]


def _leaves(x) -> dict:
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(x)[0] if isinstance(leaf, torch.Tensor)}


def _assert_leaf(name, got, expected, samples, factor, least_eps):
    if not _is_float(expected):  # tokens, for example
        assert all(torch.equal(x, expected) for x in samples), (
            f"{name}: rounding decides {expected}: another seed, scale or dtype is needed"
        )
        assert torch.equal(got, expected), f"{name}: got {got}, expected {expected}"
        return
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    eps, tiny = (max(getattr(torch.finfo(x.dtype), name) for x in (got, samples[0])) for name in ("eps", "tiny"))
    eps = max(eps, least_eps)
    got, expected, *samples = (x.detach().double().cpu() for x in (got, expected, *samples))
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{name}: finite where it should not be, or the reverse"
    assert torch.equal(got[~finite].nan_to_num(), expected[~finite].nan_to_num()), f"{name}: another infinity"
    if not expected.numel():
        return
    got, expected, *samples = (_grouped(x.masked_fill(~finite, 0)) for x in (got, expected, *samples))
    scatter = torch.stack([x - expected for x in samples]).square().sum(2).mean(0).sqrt()
    scatter = scatter + (scatter.square().sum() / scatter.count_nonzero().clamp_min(1)).sqrt()
    factor *= 1 + 8 / (len(samples) * got.shape[1])
    error, allowed = (got - expected).norm(dim=1), factor * scatter + eps * expected.norm(dim=1) + tiny
    i = int((error / allowed).argmax())
    assert (error <= allowed).all(), (
        f"{name}: error {error[i]:.3e} in group {i}, allowed {allowed[i]:.3e} (scatter {scatter[i]:.3e})"
    )


def _grouped(x):
    """Reshape to (groups, numbers)."""
    dims, size = x.ndim, 1
    while dims and size < GROUP:
        dims -= 1
        size *= x.shape[dims]
    return x.reshape(-1, size)
