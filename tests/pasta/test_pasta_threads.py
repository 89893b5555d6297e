"""One adapted model, called by several threads at once, as servers and DataParallel do.

All threads give the result of one thread, up to rounding: libraries may split a sum among as many threads as are free.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import pasta_models as models
import pytest
import torch
from accuracy import WithinRounding
from peft.utils.other import ModulesToSaveWrapper
from threads import assert_same_in_threads, in_threads, objects_after

from peft_kernels import pasta

THREADS = 8
NAMES = ("default", "other", "__base__")


def _two_adapters(family):
    model = models.adapted(family)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    models.fill(model, "other", 2)
    with torch.no_grad():
        for wrapper in (m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)):
            for parameter in wrapper.modules_to_save["other"].parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    return model


def _requests():
    """Calls of different lengths and with different adapters; every third one has no names, every seventh one is an
    error.
    """
    requests = []
    for i in range(24):
        x = models.inputs(b=1 + i % 4, n=9 + i % 7, seed=i)
        if i % 3:
            x["adapter_names"] = [NAMES[(i + row) % 3] for row in range(1 + i % 4)]
        if i % 7 == 6:
            x["input_ids"][0, :] = models.SEP  # more than the adapter has vectors
            x["adapter_names"] = ["default"] * len(x["input_ids"])
        requests.append(x)
    return requests


def _answer(model, request):
    try:
        return model(**request).logits
    except ValueError as error:
        return str(error)


@torch.no_grad()
def _expected(model, request):
    """The answer of a single thread: an error, or numbers up to rounding."""
    answer = _answer(model, request)
    return answer if isinstance(answer, str) else WithinRounding(lambda: _answer(model, request))


@pytest.mark.parametrize(
    ("family", "fused", "calls"),
    [("bert", False, 1000), ("bert", True, 1000), ("modernbert", True, 400), ("albert", False, 400)],
)
def test_threads(family, fused, calls):
    model, requests = _two_adapters(family), _requests()
    if fused:
        pasta.fuse(model)
    expected = [_expected(model, request) for request in requests]
    assert sum(isinstance(e, str) for e in expected) == 3

    @torch.no_grad()
    def serve(number):
        for call in range(calls // THREADS):
            i = (5 * number + call) % len(requests)
            got = _answer(model, requests[i])
            if isinstance(expected[i], str):
                assert got == expected[i]
            else:
                expected[i].check(got)

    in_threads(THREADS, serve)


def test_gradients_in_threads():
    """Each thread gets the gradients of its own rows, with checkpointing, which runs layers again in the backward
    pass.
    """
    model = models.adapted("bert", "TOKEN_CLS").train()
    model.gradient_checkpointing_enable()
    requests = [models.inputs(n=9 + i, seed=i) for i in range(THREADS)]

    def gradient(x):
        return torch.autograd.grad(model(**x).logits.square().sum(), models.vectors(model))[0]

    assert_same_in_threads(gradient, requests)


def _replica(module):
    """A replica as torch.nn.parallel.replicate makes it: the same attributes and hooks, other submodules."""
    twin = module._replicate_for_data_parallel()
    twin._modules = {name: child if child is None else _replica(child) for name, child in module._modules.items()}
    twin._parameters = {name: p if p is None else p * 1 for name, p in module._parameters.items()}
    return twin


@pytest.mark.parametrize(("family", "fused"), [("bert", False), ("bert", True), ("modernbert", True)])
def test_data_parallel(family, fused):
    model = models.adapted(family)
    if fused:
        pasta.fuse(model)
    x = models.inputs(b=8)

    def results(logits):
        return logits.detach(), *torch.autograd.grad(logits.square().sum(), models.vectors(model))

    expected = WithinRounding(lambda: results(model(**x).logits))
    parts = [{k: v[i : i + 2] for k, v in x.items()} for i in range(0, 8, 2)]
    replicas = [_replica(model) for _ in parts]
    with ThreadPoolExecutor(len(parts)) as pool:
        expected.check(results(torch.cat(list(pool.map(lambda pair: pair[0](**pair[1]).logits, zip(replicas, parts))))))


def test_memory_does_not_grow():
    """It grows neither with calls nor with threads that have ended, some of them with an error."""
    model, requests = _two_adapters("bert"), _requests()
    pasta.fuse(model)

    @torch.no_grad()
    def serve():
        for request in requests[:7]:
            _answer(model, request)

    (objects, tensors), (objects_later, tensors_later) = objects_after(3, serve), objects_after(10, serve)
    # other libraries may keep a few objects, fewer than the calls, but no tensors
    assert objects_later - objects < 100 and tensors_later == tensors
