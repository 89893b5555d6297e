"""Declared arguments: what is checked, what is returned and what the messages say."""

import pytest
import torch

from peft_kernels.ops.arguments import FEW_VALUES, FLOATS, INTEGERS, Argument, Arguments, values_are_checked

ARGUMENTS = Arguments(
    x=Argument("B S d | B d", FLOATS),
    weight=Argument("V d", like="x", at_least_1="V"),
    square=Argument("d d", like="x", or_float32=True, optional=True),
    ids=Argument("B k", INTEGERS, values="[-1, V)", optional=True),
    lengths=Argument("B", values="[0, S]", optional=True),
)
X, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)
IDS, LENGTHS = torch.zeros(2, 6, dtype=torch.int32), torch.zeros(2, dtype=torch.long)
TENSORS = {"x": X, "weight": WEIGHT, "square": torch.zeros(4, 4), "ids": IDS, "lengths": LENGTHS}


def check(**changed):
    return ARGUMENTS.check("toy", *(TENSORS | changed).values())


def test_sizes():
    assert check()._asdict() == {"B": 2, "S": 3, "d": 4, "V": 5, "k": 6}
    sizes = check(x=X[:, 0], ids=None, square=None)
    assert (sizes.B, sizes.S, sizes.d, sizes.k) == (2, None, 4, None)


def test_tensors_that_are_taken():
    check(weight=torch.nn.Parameter(WEIGHT), lengths=LENGTHS.bool())
    half = check(x=X.half(), weight=WEIGHT.half(), square=torch.zeros(4, 4))
    assert half == check()
    with torch._subclasses.FakeTensorMode() as mode:
        assert ARGUMENTS.check("toy", *map(mode.from_tensor, TENSORS.values())) == check()
    torch.vmap(lambda x: check(x=x) and x)(torch.zeros(7, 2, 3, 4))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x must be a tensor, got \[1.0\]"),
        ({"weight": None}, TypeError, "weight must be a tensor, got None"),
        ({"x": X[0, 0]}, ValueError, r"x must be \(B, S, d\) or \(B, d\), got \(4,\)"),
        ({"x": X.int()}, TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must be \(V, 4\) with V at least 1 for x \(2, 3, 4\), got \(4,\)"),
        ({"weight": WEIGHT[:0]}, ValueError, r"weight must be .* with V at least 1 for .*, got \(0, 4\)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must be torch.float32 like x, got torch.float16"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu like x, got meta"),
        ({"square": torch.zeros(4, 3)}, ValueError, r"square must be \(4, 4\) for x \(2, 3, 4\), got \(4, 3\)"),
        ({"square": torch.zeros(4, 4).half()}, TypeError, "square must be torch.float32 like x, or float32, got"),
        ({"ids": IDS[:1]}, ValueError, r"ids must be \(2, k\) for x \(2, 3, 4\), got \(1, 6\)"),
        ({"ids": IDS.bool()}, TypeError, "ids must be int32 or int64, got torch.bool"),
        ({"lengths": LENGTHS[:1]}, ValueError, r"lengths must be \(2,\) for x \(2, 3, 4\), got \(1,\)"),
        ({"weight": torch.nested.nested_tensor([WEIGHT])}, ValueError, "weight must be a dense tensor, got a nested"),
        (
            {"weight": torch.nested.nested_tensor([WEIGHT], layout=torch.jagged)},
            ValueError,
            "weight must be a dense tensor, got a nested",
        ),
    ],
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=f"^toy: {message}"):
        check(**changed)


def test_dtensors_are_refused():
    class Distributed(torch.Tensor):
        placements = ()

    with pytest.raises(TypeError, match="weight is a DTensor, which is not supported: pass its local tensor"):
        check(weight=WEIGHT.as_subclass(Distributed))


@pytest.mark.parametrize("columns", [6, FEW_VALUES])
def test_values(columns):
    ids = torch.full((2, columns), 4)

    def check_values():
        return ARGUMENTS.check_values("toy", ids=ids, lengths=torch.tensor([0, 3]), V=5, S=3)

    few = columns * 2 <= FEW_VALUES
    assert check_values() == {"lengths": [0, 3]} | ({"ids": ids.tolist()} if few else {})
    for value in (-2, 5):
        ids[1, 2] = value
        with pytest.raises(ValueError, match=rf"toy: ids must lie in \[-1, 5\), got values from {min(value, 4)} to "):
            check_values()
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 3\], got values from 0 to 4"):
        ARGUMENTS.check_values("toy", ids=ids[:0], lengths=torch.tensor([0, 4]), V=5, S=3)


def test_values_on_a_device_are_checked_on_request(monkeypatch):
    meta = X.to("meta")
    monkeypatch.delenv("PEFT_KERNELS_DEBUG", raising=False)
    assert values_are_checked(X) and not values_are_checked(meta)
    monkeypatch.setenv("PEFT_KERNELS_DEBUG", "1")
    assert values_are_checked(meta)


@pytest.mark.parametrize("changed", [{}, {"square": torch.zeros(4, 3)}])
def test_compiles_with_dynamic_shapes(changed):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *tensors: tensors[0] * ARGUMENTS.check("toy", *tensors).V, fullgraph=True, dynamic=True, backend="eager"
    )
    tensors = (TENSORS | changed).values()
    if changed:
        with pytest.raises(Exception, match=r"square must be \(4, 4\) for x \(2, 3, 4\), got \(4, 3\)"):
            compiled(*tensors)
    else:
        assert torch.equal(compiled(*tensors), X * 5)
