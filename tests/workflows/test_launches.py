"""What a GPU would be asked to do: kernels, host reads and allocations, counted on the CPU.

Operators run as on a GPU: Triton kernels, here in the interpreter, and no check of values. A step is compared with the
stock model's, since its own operations differ between the versions of transformers.
"""

from collections import Counter
from functools import partial
from importlib import import_module

import pytest
import torch
from combinations import bert, put_on, t5
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

from peft_kernels import pid
from peft_kernels.ops import registry
from peft_kernels.ops.implementations import Implementations

pytest.importorskip("triton")

HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique")
ALLOCATIONS = ("empty", "new_empty", "empty_strided", "empty_like", "new_empty_strided")
NEITHER = ("detach", "lift_fresh", "_unsafe_view", "promote_types")


class Requests(TorchDispatchMode):
    """Counts kernels, host reads and allocations, also inside of our operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        returns = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        if name in HOST_READS:
            self.counts["host reads"] += 1
        elif name in ALLOCATIONS:
            self.counts["allocations"] += 1
        elif func.namespace != "peft_kernels" and not is_view and name not in NEITHER:
            self.counts["kernels"] += 1
        return func(*args, **(kwargs or {}))


class Counted:
    """An implementation whose calls are counted by ``requests``."""

    def __init__(self, module, requests):
        self.module, self.requests = module, requests

    def __getattr__(self, name):
        value = getattr(self.module, name)
        if not callable(value) or name == "unavailable":
            return value

        def call(*args, **kwargs):
            with self.requests:
                return value(*args, **kwargs)

        return call


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Returns a function that counts what a call asks for."""
    if torch.cuda.is_available():
        pytest.skip("counts are taken in the interpreter")
    import triton.runtime.interpreter as interpreter

    requests = Requests()
    run = interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        requests.counts["kernels"] += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    for package in registry.packages():
        module = import_module(f"peft_kernels.ops.{package}")
        monkeypatch.setattr(module, "values_are_checked", lambda x: False, raising=False)
        if hasattr(module, "choose"):
            monkeypatch.setattr(module, "choose", lambda *args: "triton")
    runnable = Implementations.runnable
    monkeypatch.setattr(Implementations, "runnable", lambda self, *args: Counted(runnable(self, *args), requests))
    monkeypatch.setattr(
        Implementations, "resolve", lambda self, name, impl, *args: self.runnable(name, "triton", *args)
    )

    def count(call) -> Counter:
        requests.counts.clear()
        with torch.no_grad(), requests:
            call()
        return Counter(requests.counts)

    return count


SMALL = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SMALL |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SMALL |= {"eos_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": None}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 48, "suppress_tokens": None}
IDS = torch.randint(4, 99, (2, 9), generator=torch.Generator().manual_seed(1))
MODELS = {
    "t5": (t5, {"input_ids": IDS}),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**SMALL)), {"input_ids": IDS}),
    "whisper": (
        lambda: WhisperForConditionalGeneration(WhisperConfig(**SMALL, **WHISPER, begin_suppress_tokens=None)),
        {"input_features": torch.randn(2, 8, 40)},
    ),
}


def difference(a: Counter, b: Counter) -> dict:
    return {name: a[name] - b[name] for name in ("kernels", "host reads", "allocations")}


def step_of(generate, count) -> Counter:
    """What a decoding step asks for: generating seven tokens, less generating six."""
    longer, shorter = (count(lambda n=n: generate(max_new_tokens=n, min_new_tokens=n)) for n in (7, 6))
    return Counter(difference(longer, shorter))


@pytest.mark.parametrize("family", MODELS)
def test_a_step_of_beam_search(family, as_on_a_gpu):
    """Reordering beams does not copy the keys and values of the two layers; attention is one kernel, as stock."""
    build, x = MODELS[family]
    torch.manual_seed(0)
    model = build().eval()
    stock = step_of(partial(model.generate, **x, num_beams=3), as_on_a_gpu)
    ours = step_of(partial(pid.enable(model, pack_weights=False).generate, **x, num_beams=3), as_on_a_gpu)
    assert difference(ours, stock) == {"kernels": -4, "host reads": 0, "allocations": 2}


@pytest.mark.parametrize("streams", ["uniform", "ragged"])
def test_a_step_of_prompts(streams, as_on_a_gpu):
    """Ragged streams ask for nothing more, and the device is read as often as by the stock model."""
    model, prompts = t5(), {"uniform": [[[5], [6]], [[7], [8]]], "ragged": [[[5], [6], [7]], [[8]]]}
    ids, starts = IDS.repeat_interleave(2, 0), torch.tensor([[0, 5], [0, 6], [0, 7], [0, 8]])
    stock = step_of(partial(model.generate, ids, decoder_input_ids=starts), as_on_a_gpu)
    pid.enable(model, pack_weights=False, drop_finished=False)
    ours = step_of(partial(pid.generate, model, IDS, prompts[streams]), as_on_a_gpu)
    assert difference(ours, stock) == {"kernels": 0, "host reads": 0, "allocations": 2}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("DePT", {"kernels": 2, "host reads": 0, "allocations": 1}),
        ("PASTA", {"kernels": 3, "host reads": 0, "allocations": 2}),
        ("PASTA, fuse", {"kernels": -2, "host reads": 0, "allocations": 6}),
    ],
)
def test_a_forward_of_an_adapter(name, expected, as_on_a_gpu):
    """Compared with the model without it: DePT embeds in one kernel and extends the mask; PASTA looks for special
    tokens once and adds to them in each of two layers, fused in place of the norm.
    """
    x = {"input_ids": torch.tensor([[2, 11, 12, 3, 0], [2, 11, 3, 0, 0]])}
    x["attention_mask"] = (x["input_ids"] != 0).long()
    if name == "DePT":
        x["decoder_input_ids"] = x["input_ids"]
    model = t5() if name == "DePT" else bert()
    stock = as_on_a_gpu(lambda: model(**x))
    for part in name.split(", "):
        model = put_on(model, part)
    model(**x)
    assert difference(as_on_a_gpu(lambda: model(**x)), stock) == expected
