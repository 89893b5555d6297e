"""A small call of every public operator, for tests of all operators, and what those tests share."""

from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from accuracy import WithinRounding
from against_reference import widened
from torch import Tensor

from peft_kernels import ops


class Case(NamedTuple):
    """``tensors``: all arguments; ``laid_out``: those whose strides change; ``varying``: those that cannot have a
    stride of 0; ``constant``: those that get no gradient.
    """

    package: str
    tensors: dict[str, Tensor]
    laid_out: tuple[str, ...]
    options: dict = {}
    varying: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()

    def to(self, device, dtype=None):
        """The case with its tensors on ``device``, floating-point tensors in ``dtype``."""
        return self._replace(
            tensors={name: x.to(device, dtype if x.is_floating_point() else None) for name, x in self.tensors.items()}
        )

    def trainable(self):
        """The names of the arguments that may require gradients."""
        return [name for name, x in self.tensors.items() if x.is_floating_point() and name not in self.constant]


def integers(*values):
    return torch.tensor(values)


def repeated(count, *values):
    """``count`` rows, which repeat ``values``."""
    return integers(*values)[torch.arange(count) % len(values)]


def attention(batch=3, length=7, width=16):
    keys = {"key": torch.randn(batch, 1, length, width), "value": torch.randn(batch, 1, length, width)}
    streams = torch.arange(batch).repeat_interleave(2)
    vectors = {"key_lengths": repeated(batch, length, 2, 5), "encoder_index": streams}
    return Case(
        "shared_cross_attention",
        {"query": torch.randn(2 * batch, 1, 3, width), **keys, **vectors},
        tuple(vectors),
        {"return_lse": True},
    )


def label_attention(batch=3, length=7, width=32):
    return label_attention_of(
        torch.randn(3, width), torch.randn(batch, length, width), lengths=repeated(batch, length, 2, 5)
    )


def label_attention_of_joined_rows(batch=3, length=11, width=32):
    """The first of every three rows has a quarter of the tokens, the second none."""
    lengths = repeated(batch, length // 4 + 1, 0, length - length // 4 - 1)
    offsets = torch.cat((integers(0), lengths.cumsum(0)))
    return label_attention_of(torch.randn(batch, 3, width), torch.randn(int(offsets[-1]), width), offsets=offsets)


def label_attention_of(slots, features, **rows):
    width = slots.shape[-1]
    weights = {name: torch.randn(width, width) for name in ("w_q", "w_k", "w_v")}
    return Case(
        "label_cross_attention",
        {"slots": slots, "features": features, **weights, **rows},
        tuple(rows),
        {"num_heads": 2},
        tuple(rows) if "offsets" in rows else (),
        ("features",),
    )


def words(batch=3, length=5, width=24, classes=2, vocabulary=9):
    case = words_of_rows(batch, width=width, classes=classes, vocabulary=vocabulary)
    positions = {"positions": repeated(batch, length - 1, 0, 2)}
    tensors = {**case.tensors, "hidden": torch.randn(batch, length, width), **positions}
    return case._replace(tensors=tensors, laid_out=(*case.laid_out, *positions))


def words_of_rows(batch=3, length=1, width=24, classes=2, vocabulary=9):
    label_ids = ((4 + 4 * torch.arange(3 * classes)) % vocabulary).view(classes, 3)
    label_ids[1::2, 2] = -1
    vectors = {"label_ids": label_ids, "bias": torch.randn(vocabulary)}
    large = {"hidden": torch.randn(batch, width), "weight": torch.randn(vocabulary, width)}
    return Case("label_logits", {**large, **vectors}, tuple(vectors), {"reduce": "logsumexp"})


def scores(batch=4, length=1, width=8):
    vectors = {"radius": torch.randn(3), "scores": torch.randn(batch, 3)}
    large = {"features": torch.randn(batch, width), "projection": torch.randn(5, width)}
    tensors = {**large, "prototypes": torch.randn(3, 5), **vectors}
    return Case("prototype_scores", tensors, tuple(vectors), constant=("scores",))


def loss(batch=4, length=1, width=8):
    case, labels = scores(batch, length, width), {"labels": repeated(batch, 2, 0, 1, 1)}
    return case._replace(
        tensors=case.tensors | labels, laid_out=(*case.laid_out, *labels), constant=("scores", "prototypes")
    )


def special_ids(batch=2, length=6, width=1):
    rows = repeated(batch * length, 1, 5, 2, 9, 5, 2, 1, 7, 8, 2, 2, 3).view(batch, length)
    mask = repeated(batch * length, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1).view(batch, length)
    vectors = {"input_ids": rows, "special_ids": integers(1, 2, 9), "attention_mask": mask}
    return Case("special_tokens", vectors, tuple(vectors), {"max_slots": length})


def injection(batch=3, length=6, width=20):
    vectors = {"vectors": torch.randn(2, 2, width), "seed": integers(12345678901)}
    vectors["slots"] = repeated(batch, [0, 3], [5, -1], [2, 1])
    vectors["adapter_ids"] = repeated(batch, 1, 0, -1)
    tensors = {"hidden": torch.randn(batch, length, width), **vectors}
    return Case("special_tokens", tensors, tuple(vectors), {"dropout_p": 0.3})


def norm(batch=3, length=6, width=20):
    case = injection(batch, length, width)
    vectors = {name: case.tensors[name] for name in case.laid_out}
    vectors |= {"weight": torch.randn(width), "bias": torch.randn(width)}
    large = {name: torch.randn(batch, length, width) for name in ("x", "residual")}
    return Case("add_layer_norm_inject", {**large, **vectors}, tuple(vectors), case.options)


def embedding(batch=3, length=4, width=24):
    return embedding_of(batch, length, width, delta=torch.randn(2, length + 1, width))


def embedding_of_low_rank(batch=3, length=4, width=24):
    return embedding_of(batch, length, width, a=torch.randn(2, length + 1, 3), b=torch.randn(2, 3, width))


def embedding_of(batch, length, width, **parameters):
    rows = {
        "input_ids": repeated(batch * length, 3, 1, 7, 4, 2, 6, 0, 5, 1, 1, 3, 8).view(batch, length),
        "offsets": repeated(batch, 0, 3, 1),
        "adapter_ids": repeated(batch, 1, -1, 0),
    }
    vectors = {**rows, "prompt": torch.randn(2, 3, width), **parameters}
    return Case("decomposed_prompt_embedding", {"weight": torch.randn(9, width), **vectors}, tuple(vectors))


CASES = {
    "shared_cross_attention": attention,
    "label_cross_attention": label_attention,
    "label_cross_attention of joined rows": label_attention_of_joined_rows,
    "label_logits": words,
    "label_logits of rows": words_of_rows,
    "prototype_scores": scores,
    "prototype_cross_entropy": loss,
    "special_token_slots": special_ids,
    "special_token_add": injection,
    "special_token_add_": injection,
    "add_layer_norm_inject": norm,
    "add_inject_layer_norm": norm,
    "decomposed_prompt_embedding": embedding,
    "decomposed_prompt_embedding of low rank": embedding_of_low_rank,
}


def implementations_of(package):
    return import_module(f"peft_kernels.ops.{package}").implementations


PAIRS = [(name, impl) for name, case in CASES.items() for impl in implementations_of(case().package).names]
DIFFERENTIABLE = [pair for pair in PAIRS if pair[0] != "special_token_slots"]


def assert_refused(operator, arguments, *changes):
    """``changes``: values in place of some ``arguments``, by their positions, and the message of the refusal."""
    for changed, message in changes:
        with pytest.raises(RuntimeError, match=message):
            operator(*(changed.get(i, x) for i, x in enumerate(arguments)))


def impl_fixture(implementations, *names):
    """A fixture ``impl``: each of ``names``, if it runs on this device."""

    @pytest.fixture(params=names)
    def impl(request, device):
        skip_unless_taken(implementations, request.param, device, torch.float32)
        return request.param

    return impl


def skip_unless_taken(implementations, impl, device, dtype):
    if impl != "auto" and (reason := implementations.unavailable(impl, device.type, dtype)):
        pytest.skip(reason)


def call(name, impl, tensors, options):
    """A tuple of the results."""
    if name == "special_token_add_":
        tensors = {**tensors, "hidden": tensors["hidden"] * 1}
    results = getattr(ops, name.split()[0])(**tensors, **options, impl=impl)
    return results if isinstance(results, tuple) else (results,)


def run(name, impl, case, of=torch.ones_like, wanted=None, call=call):
    """Results, and the gradients of ``wanted``, by default of all that may have one. ``of``: a result's gradient.
    Leaves keep the strides of the tensors that they replace.
    """
    wanted = case.trainable() if wanted is None else wanted
    tensors = {key: x.detach().requires_grad_(key in wanted) for key, x in case.tensors.items()}
    results = call(name, impl, tensors, case.options)
    outs = [x for x in results if x.requires_grad]
    if outs:
        torch.autograd.backward(outs, [of(x) for x in outs])
    gradients = {key: x.grad for key, x in tensors.items() if x.grad is not None}
    return {f"result {i}": x.detach() for i, x in enumerate(results)} | gradients


def expected_of(name, case, of=torch.ones_like):
    """The reference's results and gradients."""
    wide = case._replace(tensors=widened(case.tensors))
    return WithinRounding(lambda: run(name, "reference", case, of), run(name, "reference", wide, of))
