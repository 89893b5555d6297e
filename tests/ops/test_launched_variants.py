"""Every Triton kernel that a launcher can launch is among the variants that `make test-kernels` compiles."""

from importlib import import_module
from itertools import product

import pytest
import torch

pytest.importorskip("triton")
from peft_kernels.ops.registry import declared
from peft_kernels.ops.variant import ARCHITECTURES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="launches are recorded in the interpreter")

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "half"}


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def integers(*values):
    return torch.tensor(values)


def attention(impl, dtype):
    for d, (inputs, streams, tokens), heads, n in product(
        (64, 80, 96, 128, 256),
        ((1, 1, 1), (1, 30, 1), (1, 30, 8), (2, 4, 16), (4, 40, 5), (1, 2, 300)),
        (2, 12),
        (40, 600, 3000),
    ):
        query, grad = (empty(inputs * streams, heads, tokens, d, dtype=dtype) for _ in range(2))
        key, value = (empty(inputs, heads, n, d, dtype=dtype) for _ in range(2))
        out, lse = impl.forward(query, key, value, None, None, 0.1)
        for needs in ((True, True, True), (False, True, False), (False, False, True)):
            impl.backward(grad, None, query, key, value, out, lse, None, None, 0.1, *needs)


def label_attention(impl, dtype):
    features = empty(3, 9, 64, dtype=dtype)
    for wide, slots, shared, offsets in product({dtype, torch.float32}, (1, 17, 40, 100, 300), (True, False), (0, 1)):
        of_rows = (features.view(27, 64), None, integers(0, 9, 18, 27)) if offsets else (features, None, None)
        queries, grad = empty(1, 1, slots, 64, dtype=wide), empty(1, 3, slots, 64, dtype=wide)
        _, weights = impl.pool(queries, *of_rows, 0.1, True)
        impl.pool_backward(grad, of_rows[0], weights, *of_rows[1:], 0.1, shared)


def logits(impl, dtype):
    weight = empty(50, 64, dtype=dtype)
    for words in (1, 2, 3, 8, 40):
        ids = torch.zeros(1, words, dtype=torch.long)
        impl.forward(empty(3, 64, dtype=dtype), weight, ids, None, None)
        impl.backward(empty(3, 1, words), weight, ids)


def special_tokens(impl, dtype):
    slots, vectors = integers(0, 1)[None], empty(1, 2, 64)
    impl.slots(integers(1, 2)[None], integers(1), None, 2)
    impl.add_(empty(1, 4, 64, dtype=dtype), vectors, slots, 0.0, None, None)
    impl.backward(empty(1, 4, 64, dtype=dtype), slots, 1, 2, 0.0, None, None)


def norms(impl, dtype):
    for width, rms, pre in product((800, 8192), (False, True), (False, True)):
        x, weight, vectors, slots = (
            empty(1, 4, width, dtype=dtype),
            empty(width),
            empty(1, 2, width),
            integers(0, 1)[None],
        )
        _, *saved = impl.forward(x, x, weight, weight, vectors, slots, None, 1e-5, rms, pre, 0.0, None, True)
        for needs in ((True, True), (False, True)):
            impl.backward(x, x, *saved, weight, slots, None, 1, 2, rms, pre, 0.0, None, *needs)


def scores(impl, dtype):
    for width in (100, 8192) if dtype == torch.float32 else ():
        x, prototypes, radius = empty(20, width), empty(3, width), empty(3)
        grad = impl.forward(x, prototypes, radius, None, 1.0)
        impl.backward(grad, x, prototypes)
        impl.cross_entropy(x, prototypes, radius, None, 1.0, torch.zeros(20, dtype=torch.long))


def embedding(impl, dtype):
    ids, weight, prompt, a, b = (
        torch.zeros(2, 5, dtype=torch.long),
        empty(9, 64, dtype=dtype),
        empty(1, 3, 64),
        empty(1, 5, 8),
        empty(1, 8, 64),
    )
    for first, update in product((False, True), ((a, b, None), (None, None, empty(1, 5, 64)))):
        out = impl.forward(ids, weight, prompt, *update, 1.0, 1.0, None, first, None)
        impl.backward(out, 1, 3, 5, None, first, None, True, True)


CALLS = {
    "shared_cross_attention": attention,
    "label_cross_attention": label_attention,
    "label_logits": logits,
    "special_tokens": special_tokens,
    "add_layer_norm_inject": norms,
    "prototype_scores": scores,
    "decomposed_prompt_embedding": embedding,
}


def key_of(function, options, types):
    """What decides a binary: the kernel, its constants, the compiler's options and its floats' types, of present ones.

    The head width D only bounds the columns of BLOCK_D.
    """
    values = {name: value for name, value in options.items() if name != "D"}
    return function.__name__, tuple(sorted(values.items())), types


@pytest.fixture
def launches(monkeypatch):
    """Launches are recorded instead of run: the key of each, and its floats' types by argument."""
    from triton.runtime.interpreter import InterpretedFunction

    records = set()

    def record(self, *args, grid, warmup, **options):
        floats = {name: TYPES.get(x.dtype) for name, x in zip(self.arg_names, args) if isinstance(x, torch.Tensor)}
        types = frozenset((name, kind) for name, kind in floats.items() if kind)
        records.add(key_of(self.fn, options, types))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return records


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("package", CALLS)
def test_every_launch_is_compiled(package, architecture, launches, monkeypatch):
    assert CALLS.keys() == declared("variants").keys()
    impl = import_module(f"peft_kernels.ops.{package}.triton")
    monkeypatch.setattr(impl, "device_of", lambda device: (architecture, MULTIPROCESSORS[architecture]), raising=False)
    for dtype in (torch.float32, torch.bfloat16):
        CALLS[package](impl, dtype)
    compiled = {}
    for module in declared("variants").values():
        for variant in module.variants():
            if variant.architecture == architecture:
                kinds = {"*fp32": "float", "*fp16": "half", "*bf16": "half"}
                types = {name: kinds[kind] for name, kind in variant.types.items() if kind in kinds}
                function, options, _ = key_of(variant.function.fn, variant.options, None)
                compiled.setdefault((function, options), []).append(
                    frozenset((name, kind) for name, kind in types.items() if name in variant.function.arg_names)
                )
    missing = [x for x in launches if not any(x[2] <= types for types in compiled.get(x[:2], ()))]
    assert not missing, "\n".join(map(str, sorted(missing, key=str)))
