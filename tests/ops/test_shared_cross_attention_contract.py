"""The operator's contract apart from its numbers: registration, compilation, autocast, errors, a light import."""

import subprocess
import sys

import pytest
import torch
from accuracy import assert_within_rounding
from shared_cross_attention_cases import CASES, IMPLS, make

from peft_kernels.ops import shared_cross_attention
from peft_kernels.ops.shared_cross_attention import implementations

NAMED = [
    ("lengths", "auto"),
    *((case, impl) for case in ("uniform", "ragged-lengths") for impl in ("auto", "reference", "sdpa", "matmul")),
]


def leaves(case, dtype=torch.float32):
    tensors, where = make(CASES[case], dtype)
    return [x.nan_to_num(0.5).requires_grad_() for x in tensors], where


@pytest.mark.parametrize(("case", "impl"), NAMED)
@pytest.mark.parametrize("need_lse", [True, False])
def test_opcheck(case, impl, need_lse):
    tensors, where = leaves(case)
    if not need_lse:
        tensors = [x.detach() for x in tensors]
    torch.library.opcheck(
        torch.ops.peft_kernels.shared_cross_attention.default, (*tensors, *where.values(), None, 0.3, need_lse, impl)
    )


@pytest.mark.parametrize(("case", "impl"), NAMED)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)])
def test_opcheck_backward(case, impl, needs):
    tensors, where = leaves(case)
    tensors = [x.detach() for x in tensors]
    out, lse = torch.ops.peft_kernels.shared_cross_attention(*tensors, *where.values(), None, 0.3, True, impl)
    args = (torch.ones_like(out), torch.ones_like(lse), *tensors, out, lse, *where.values(), None, 0.3, *needs, impl)
    torch.library.opcheck(torch.ops.peft_kernels.shared_cross_attention_backward.default, args)


def both(attend, tensors, where):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out, lse = attend(*tensors, **where)
    (out.square().sum() + lse.clamp_min(-1).sum()).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in tensors)]


def assert_compiles(backend, impls, cases):
    def attend(query, key, value, key_lengths, encoder_index, impl):
        return shared_cross_attention(
            query, key, value, key_lengths=key_lengths, encoder_index=encoder_index, return_lse=True, impl=impl
        )

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    for impl in impls:
        for case in cases:
            tensors, where = leaves(case)
            where["impl"] = impl
            got = both(compiled, tensors, where)
            assert_within_rounding(got, lambda tensors=tensors, where=where: both(attend, tensors, where))


def test_compiles_as_one_graph_for_all_shapes():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_compiles("aot_eager", ["auto"], ["lengths-of-two", "more-lengths"])


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_in_every_form(impl):
    torch._dynamo.reset()
    assert_compiles("aot_eager", [impl], ["uniform", "lengths", "ragged", "ragged-lengths"])


def test_compiles_with_inductor():
    torch._dynamo.reset()
    assert_compiles("inductor", ["auto"], ["ragged-lengths"])


CASES |= {
    "lengths-of-two": ((6, 2, 3, 5, 17, 16), [9, 17], None),
    "more-lengths": ((12, 3, 2, 4, 11, 16), [0, 7, 11], None),
}


def test_exports():
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, key_lengths):
            return shared_cross_attention(query, key, value, key_lengths=key_lengths)

    (query, key, value), where = make(CASES["lengths"])
    args = (query, key.nan_to_num(), value.nan_to_num(), where["key_lengths"])
    program = torch.export.export(Attend(), args)
    assert any("shared_cross_attention" in str(node.target) for node in program.graph.nodes)
    assert_within_rounding(program.module()(*args), lambda: Attend()(*args))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    tensors, where = leaves("ragged-lengths")
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = shared_cross_attention(*tensors, **where, impl=impl, return_lse=True)
        kept = shared_cross_attention(*(x.double() for x in tensors), **where)
    assert (out.dtype, lse.dtype, kept.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    assert torch.equal(out, shared_cross_attention(*(x.bfloat16() for x in tensors), **where, impl=impl))
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in tensors)


TOO_WIDE = torch.zeros(2, 1, 1, 257)
X = torch.zeros(4, 2, 3, 8)
K = torch.zeros(2, 2, 5, 8)


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


RAGGED = {"encoder_index": ints(0, 0, 0, 1)}
WRONG = [
    ({"query": X[0]}, ValueError, r"query must be \(N, H, t, D\), got \(2, 3, 8\)"),
    (
        {"key": torch.nested.nested_tensor([K[0], K[1]])},
        ValueError,
        "key must be a dense tensor, got a nested tensor",
    ),
    ({"query": X.int()}, TypeError, "query must be float32, float16, bfloat16 or float64, got torch.int32"),
    (
        {"key": K.half()},
        TypeError,
        "key must be torch.float32 like query, got torch.float16",
    ),
    (
        {"value": K[:, :, :4]},
        ValueError,
        r"value must be \(2, 2, 5, 8\) for key \(2, 2, 5, 8\) and query \(4, 2, 3, 8\), got \(2, 2, 4, 8\)",
    ),
    (
        {"key": K[:, :1], "value": K[:, :1]},
        ValueError,
        r"key must be \(b, 2, n, 8\) for query \(4, 2, 3, 8\), got \(2, 1, 5, 8\)",
    ),
    ({"query": TOO_WIDE, "key": TOO_WIDE, "value": TOO_WIDE}, ValueError, "between 1 and 256, got 257"),
    ({"query": X[..., :0], "key": K[..., :0], "value": K[..., :0]}, ValueError, "between 1 and 256, got 0"),
    ({"key": K.to("meta")}, ValueError, "key must be on cpu like query, got meta"),
    ({"query": X[:3]}, ValueError, "multiple of the number of inputs, got 3 streams and 2 inputs"),
    ({"key": K[:0], "value": K[:0]}, ValueError, r"4 streams need at least one input, got key \(0, 2, 5, 8\)"),
    ({"key_lengths": torch.zeros(2)}, TypeError, "key_lengths must be int32 or int64, got torch.float32"),
    ({"key_lengths": ints(5)}, ValueError, r"key_lengths must be \(2,\) for key \(2, 2, 5, 8\), got \(1,\)"),
    ({"key_lengths": ints(5, 6)}, ValueError, r"key_lengths must lie in \[0, 5\], got values from 5 to 6"),
    ({"key_lengths": ints(-1, 5)}, ValueError, r"key_lengths must lie in \[0, 5\], got values from -1 to 5"),
    ({"key_lengths": ints(1, 2).to("meta")}, ValueError, "key_lengths must be on cpu like query, got meta"),
    (
        {"encoder_index": ints(0, 0, 1)},
        ValueError,
        r"encoder_index must be \(4,\) for query \(4, 2, 3, 8\), got \(3,\)",
    ),
    ({"encoder_index": ints(0, 0, 1, 1).bool()}, TypeError, "encoder_index must be int32 or int64, got torch.bool"),
    ({"encoder_index": ints(0, 1, 0, 1)}, ValueError, "encoder_index must not decrease"),
    ({"encoder_index": ints(0, 1, 1, 2)}, ValueError, r"encoder_index must lie in \[0, 2\), got values from 0 to 2"),
    ({"cu_streams": ints(0, 2, 4)}, ValueError, "cu_streams must be .* with encoder_index, got no encoder_index"),
    ({**RAGGED, "cu_streams": ints(0, 4)}, ValueError, r"cu_streams must be \(b \+ 1,\) .* got 2 values for 2 inputs"),
    ({**RAGGED, "cu_streams": ints(0, 2, 4)}, ValueError, r"cu_streams must be \[0, 3, 4\] .* got \[0, 2, 4\]"),
    ({**RAGGED, "cu_streams": ints(0, 3, 4) / 1}, TypeError, "cu_streams must be int32 or int64, got torch.float32"),
    ({"encoder_index": ints(-1, 0, 0, 1)}, ValueError, r"encoder_index must lie in \[0, 2\), got values from -1 to 1"),
]


@pytest.mark.parametrize("impl", implementations.names)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_streams_that_are_passed_are_those_that_are_computed(impl, dtype):
    if reason := implementations.unavailable(impl, "cpu", torch.float32):
        pytest.skip(reason)
    query, key, value = torch.randn(4, 2, 3, 8), *torch.randn(2, 3, 2, 5, 8)
    results = []
    for starts in ({}, {"cu_streams": torch.tensor([0, 3, 3, 4], dtype=dtype)}):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = shared_cross_attention(*leaves, encoder_index=torch.tensor([0, 0, 0, 2]), **starts, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_says_what_is_wrong(change, kind, message):
    args = {"query": X, "key": K, "value": K, **change}
    with pytest.raises(kind, match="shared_cross_attention: .*" + message):
        shared_cross_attention(**args)


def test_an_implementation_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(implementations.module("sdpa"), "unavailable", lambda device, dtype: "the moon is full")
    with pytest.raises(ValueError, match="impl='sdpa' cannot run here: the moon is full"):
        shared_cross_attention(X, K, K, impl="sdpa")


@pytest.mark.parametrize("impl", ["sdpa", "matmul"])
def test_host_implementations_refuse_other_devices(impl):
    assert "triton" in implementations.module(impl).unavailable("cuda", torch.float32)
    assert impl in implementations.names


IMPORT = """
import sys, time
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "peft", "triton", "typer", "rich", "safetensors", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import torch
sys.meta_path.insert(0, Blocked())
start = time.perf_counter()
import peft_kernels
print(time.perf_counter() - start)
x = torch.zeros(4, 2, 3, 8)
peft_kernels.ops.shared_cross_attention(x, x[:2], x[:2])
assert not torch.cuda.is_initialized()
assert "torch._inductor" not in sys.modules and "torch._dynamo" not in sys.modules
"""


def test_import_needs_torch_only():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5
