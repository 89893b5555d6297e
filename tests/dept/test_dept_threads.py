"""One adapted model, called by several threads at once, as servers do.

All threads give the result of one thread, up to rounding: libraries may split a sum among as many threads as are free.
"""

import dept_models as models
import pytest
import torch
from accuracy import WithinRounding, assert_no_near_tie, assert_within_rounding
from threads import assert_same_in_threads, in_threads, objects_after

THREADS = 8


def _requests(name):
    """Calls of different lengths, some of them with other adapters in their rows; every seventh one is an error."""
    requests = []
    for i in range(14):
        x = models.inputs(b=1 + i % 3, n=4 + i % 7, padding="right" if i % 2 else "none", seed=i)
        x |= models.targets(name, x) if i % 2 or name == "t5" else {}
        if i % 3 == 1:
            x["adapter_names"] = ["other", "__base__", "default"][: 1 + i % 3]
        if i % 7 == 6:
            x["attention_mask"] = x["attention_mask"][:, :-1]
        requests.append(x)
    return requests


def _answer(model, request, generates):
    try:
        if generates:
            return [
                model.generate(
                    **{k: v for k, v in request.items() if k != "labels"},
                    max_new_tokens=4,
                    pad_token_id=0,
                    eos_token_id=None,
                )
            ]
        return [v for v in model(**request).values() if isinstance(v, torch.Tensor)]
    except ValueError as error:
        return str(error)


class _Expected:
    """The answer of a single thread: an error, numbers up to rounding, or tokens that rounding does not decide."""

    def __init__(self, model, request, generates=False):
        self.answer = _answer(model, request, generates)
        if isinstance(self.answer, str):
            return
        if generates:
            assert_no_near_tie(lambda: _answer(model, request, True)[0], self.answer[0])
        else:
            self.numbers = WithinRounding(lambda: _answer(model, request, False))

    def check(self, got):
        if isinstance(self.answer, str):
            assert got == self.answer
        elif hasattr(self, "numbers"):
            self.numbers.check(got)
        else:
            assert torch.equal(got[0], self.answer[0])


@torch.no_grad()
def _adapted(name):
    model = models.adapted(name, position="token")
    model.add_adapter(
        "other", models.DePTConfig(num_virtual_tokens=models.M, r=models.R, max_length=models.S, position="token")
    )
    models.fill(model, "other", 2)
    return model


@pytest.mark.parametrize("name", ["llama", "t5", "bert-token", "roberta-qa"])
def test_threads(name):
    model, requests = _adapted(name), _requests(name)
    ways = [False, True] if model.base_model.model.can_generate() else [False]
    calls = [(request, generates) for request in requests for generates in ways]
    with torch.no_grad():
        expected = [_Expected(model, *call) for call in calls]
    assert sum(isinstance(e.answer, str) for e in expected) == 2 * len(ways)

    @torch.no_grad()
    def serve(number):
        for step in range(1000 // (THREADS * 4)):
            i = (5 * number + step) % len(calls)
            expected[i].check(_answer(model, *calls[i]))

    in_threads(THREADS, serve)


def test_gradients_in_threads():
    """Each thread gets the gradients of its own rows, with checkpointing, which runs layers again in the backward
    pass.
    """
    model = models.adapted("gpt2").train()
    model.gradient_checkpointing_enable()
    requests = [models.inputs(n=4 + i, seed=i) for i in range(THREADS)]

    def gradients(x):
        return torch.autograd.grad(model(**x, labels=x["input_ids"]).loss, models.parameters(model))

    assert_same_in_threads(gradients, requests)


def test_memory_does_not_grow():
    """It grows neither with calls nor with threads that have ended, some of them with an error."""
    model, requests = _adapted("llama"), _requests("llama")

    def serve():
        for request in requests[:7]:
            _answer(model, request, False)

    objects_after(2, serve)
    (objects, tensors), (objects_later, tensors_later) = objects_after(1, serve), objects_after(6, serve)
    assert tensors_later <= tensors and objects_later < objects + 6 * 4 * 7


def test_calls_within_generate():
    """A logits processor calls the model itself, in the middle of ``generate``."""
    model = models.adapted("llama")
    x, other = models.inputs(padding="none"), models.inputs(padding="none", n=5, seed=9)
    kwargs = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        expected = [model(**other).logits, model.generate(**other, **kwargs)]
    alone, within = model.generate(**x, **kwargs), []

    def processor(ids, scores):
        within.append([model(**other).logits, model.generate(**other, **kwargs)])
        return scores

    assert torch.equal(model.generate(**x, **kwargs, logits_processor=[processor]), alone)
    assert len(within) == 3 and all(torch.equal(a, b) for got in within for a, b in zip(got, expected, strict=True))


def test_an_error_in_the_middle_leaves_nothing_behind():
    model = models.adapted("gpt2")
    x, pretrained = models.inputs(), model.base_model.model
    expected = model(**x).logits

    def fail(*args):
        raise RuntimeError("in the middle")

    handle = pretrained.transformer.h[1].register_forward_hook(fail)
    for call in (lambda: model(**x), lambda: model.generate(**x, max_new_tokens=2)):
        with pytest.raises(RuntimeError, match="in the middle"):
            call()
    handle.remove()
    assert pretrained.dept_hooks.inserted.get() is None
    with model.disable_adapter():
        assert_within_rounding(model(**x).logits, lambda: models.stock("gpt2")(**x).logits)
    assert torch.equal(model(**x).logits, expected)
