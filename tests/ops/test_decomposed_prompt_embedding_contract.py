"""The operator's contract apart from its numbers: registration, compilation, errors."""

import pytest
import torch
from accuracy import assert_within_rounding
from test_decomposed_prompt_embedding import CASES, make

from peft_kernels.ops import decomposed_prompt_embedding
from peft_kernels.ops.decomposed_prompt_embedding import implementations

IMPLS = ["auto", "reference"]


def arguments(case, **changed):
    (ids, weight), (prompt, a, b), where = make(CASES[case])
    return {"input_ids": ids, "weight": weight, "prompt": prompt, "a": a, "b": b, **where, **changed}


@pytest.mark.parametrize("case", ["plain", "adapters-offsets", "no-token"])
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(case, impl):
    (ids, weight), trained, where = make(CASES[case])
    stacked = [(x if x.ndim == 3 else x[None]).requires_grad_() for x in trained]
    operator = torch.ops.peft_kernels.decomposed_prompt_embedding.default
    torch.library.opcheck(
        operator,
        (ids, weight.requires_grad_(), *stacked, None, 0.5, 1.5, where["offsets"], False, where["adapter_ids"], impl),
    )


@pytest.mark.parametrize(
    "needs",
    [(True, False, True, True), (True, True, False, False), (False, True, True, False), (False, True, False, False)],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_backward(needs, impl):
    _, (prompt, a, b), where = make(CASES["adapters-offsets"])
    sizes = prompt.shape[0], prompt.shape[1], a.shape[1]
    grad = torch.randn(6, 4 + 29, 40)
    need_prompt, need_a, need_b, need_delta = needs
    low_rank = a if need_b else None, b if need_a else None, 0.5
    operator = torch.ops.peft_kernels.decomposed_prompt_embedding_backward.default
    torch.library.opcheck(
        operator,
        (grad, *sizes, *low_rank, where["offsets"], False, where["adapter_ids"], need_prompt, need_delta, impl),
    )


@pytest.mark.parametrize("insert_after_first", [False, True])
def test_gradcheck(insert_after_first):
    (ids, _), (prompt, a, b), where = make(CASES["adapters-offsets"], torch.float64)
    leaves = [
        x.detach().requires_grad_()
        for x in (torch.randn(50, 5, dtype=torch.float64), prompt[..., :5], a[..., :2], b[:, :2, :5])
    ]

    def embed(table, prompt, a, b):
        return decomposed_prompt_embedding(
            ids, table, prompt, a, b, scale=0.5, insert_after_first=insert_after_first, **where
        )

    assert torch.autograd.gradcheck(embed, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_with_dynamic_shapes(impl):
    torch.compiler.reset()

    def embed(ids, weight, prompt, a, b):
        return decomposed_prompt_embedding(ids, weight, prompt, a, b, scale=0.5, impl=impl).square().sum()

    compiled = torch.compile(embed, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in ("plain", "odd-width"):
        (ids, weight), trained, _ = make(CASES[case])

        def gradients(function, table=(ids, weight), trained=trained):
            leaves = [x.detach().requires_grad_() for x in trained]
            return torch.autograd.grad(function(*table, *leaves), leaves)

        assert_within_rounding(gradients(compiled), lambda: gradients(embed))


def test_debug_switch_is_not_needed_on_the_cpu():
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 50\), got values from 1 to 50"):
        decomposed_prompt_embedding(**arguments("plain", input_ids=torch.tensor([[1, 50]])))


@pytest.mark.parametrize(
    ("case", "changed", "error", "message"),
    [
        (
            "plain",
            {"input_ids": torch.zeros(3, 21, dtype=torch.long)},
            ValueError,
            "input_ids has 21 tokens, but a has rows for 20",
        ),
        ("plain", {"input_ids": torch.zeros(3, 5)}, TypeError, "input_ids must be int32 or int64, got torch.float32"),
        (
            "plain",
            {"input_ids": torch.zeros(3, dtype=torch.long)},
            ValueError,
            r"input_ids must be \(B, L\), got \(3,\)",
        ),
        (
            "plain",
            {"input_ids": torch.tensor([[-1]])},
            ValueError,
            r"input_ids must lie in \[0, 50\), got values from -1 to -1",
        ),
        ("plain", {"weight": torch.zeros(50)}, ValueError, r"weight must be \(V, d\)"),
        ("plain", {"weight": torch.zeros(50, 32, dtype=torch.int8)}, TypeError, "weight must be float32"),
        ("plain", {"prompt": torch.zeros(5, 31)}, ValueError, "prompt must be 32 wide"),
        (
            "plain",
            {"prompt": torch.zeros(5, 32).half()},
            TypeError,
            "prompt must be torch.float32 as weight is, or float32, got torch.float16",
        ),
        ("plain", {"b": torch.zeros(3, 32)}, ValueError, "must share their rank r"),
        ("plain", {"b": None}, ValueError, "pass either a and b, or delta, got"),
        ("plain", {"delta": torch.zeros(20, 32)}, ValueError, "pass either a and b, or delta, got"),
        ("plain", {"a": None, "b": None}, ValueError, "got none of them"),
        ("plain", {"a": torch.zeros(1, 20, 4)}, ValueError, "must all have 2 dimensions, or 3 with stacked adapters"),
        ("plain", {"offsets": torch.tensor([0, 1])}, ValueError, r"offsets must be \(3,\), got \(2,\)"),
        (
            "plain",
            {"offsets": torch.tensor([0, 1, 18])},
            ValueError,
            r"offsets must lie in \[0, 18\), got values from 0 to 18",
        ),
        ("adapters", {"adapter_ids": None}, ValueError, "adapter_ids must select among the 4 adapters"),
        (
            "adapters",
            {"adapter_ids": torch.tensor([0, 1, 2, 3, 4, -1, 0])},
            ValueError,
            r"adapter_ids must lie in \[-1, 4\)",
        ),
        ("adapters", {"b": torch.zeros(3, 5, 72)}, ValueError, "b must have the 4 adapters of prompt"),
        ("plain", {"impl": "fast"}, ValueError, "impl must be 'auto' or one of"),
        ("plain", {"impl": "cuda"}, ValueError, "impl='cuda' cannot run here"),
        (
            "plain",
            {"prompt": torch.zeros(5, 32, device="meta")},
            ValueError,
            "prompt must be on cpu as weight is, got meta",
        ),
    ],
)
def test_errors(case, changed, error, message):
    with pytest.raises(error, match=message):
        decomposed_prompt_embedding(**arguments(case, **changed))


def test_the_native_operator_refuses_what_would_read_beyond_its_tensors():
    if reason := implementations.module("cpp").unavailable("cpu", torch.float32):
        pytest.skip(reason)
    ids, weight, prompt, a, b = (
        torch.tensor([[1, 2]]),
        torch.zeros(5, 16),
        torch.zeros(1, 3, 16),
        torch.zeros(1, 2, 4),
        torch.zeros(1, 4, 16),
    )
    operator = torch.ops.peft_kernels.decomposed_prompt_embedding_cpu
    for changed, message in (
        ({0: torch.tensor([[1, 5]])}, "input_ids must lie in"),
        ({1: torch.zeros(5, 16).mT.contiguous().mT}, "dense rows"),
        ({1: torch.zeros(5, 16).half()}, "float32 or bfloat16"),
        ({2: torch.zeros(1, 3, 8)}, "prompt must be"),
        ({3: torch.zeros(1, 1, 4)}, "more tokens than positions"),
        ({4: torch.zeros(1, 4, 8)}, "b must be"),
        ({8: torch.tensor([3])}, "offsets must lie in"),
        ({10: torch.tensor([1])}, "adapter_ids must lie in"),
    ):
        given = [ids, weight, prompt, a, b, None, 1.0, 1.0, None, False, None]
        for i, x in changed.items():
            given[i] = x
        with pytest.raises(RuntimeError, match=message):
            operator(*given)
