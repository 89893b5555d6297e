"""PiD in existing code: other adapters, autocast, quantised weights, pickles, threads, a changed attention function,
offload.
"""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from models import build, decided, inputs, rounding_of_logits
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import LogitsProcessor, LogitsProcessorList

from peft_kernels import pid
from peft_kernels.hf import names

BEAMS = {"num_beams": 3, "max_new_tokens": 8, "no_repeat_ngram_size": 2}


def loud(model, *names):
    """Set adapter parameters that are large enough to matter, the same for equally built models."""
    torch.manual_seed(6)
    for name, p in sorted(model.named_parameters()):
        if any(part in name for part in names):
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def with_two_adapters(model, family="t5"):
    targets = ["q", "k", "v", "o"] if family == "t5" else ["q_proj", "k_proj", "v_proj", "fc1"]
    config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=4, target_modules=targets)
    model = get_peft_model(model, config, adapter_name="a")
    model.add_adapter("b", config)
    return loud(model, "lora_")


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {}], ids=["beams", "returned", "greedy"]
)
def test_an_adapter_for_each_row(family, kwargs):
    """Each row's keys and values are those of its own adapter."""
    x, names = inputs(b=3), ["a", "b", "__base__"]
    kwargs = {**BEAMS, "num_beams": 1, **kwargs, "adapter_names": names, "encoder_no_repeat_ngram_size": 3}
    stock = with_two_adapters(build(family), family)
    stock = decided(stock, lambda: stock.generate(**x, **kwargs))
    ours = with_two_adapters(pid.enable(build(family)), family)
    assert torch.equal(ours.generate(**x, **kwargs), stock)
    assert not torch.equal(ours.generate(**x, **{**kwargs, "adapter_names": ["a"] * 3}), stock)
    shared = {k: v for k, v in kwargs.items() if k != "adapter_names"}
    assert torch.equal(ours.generate(**x, **shared), with_two_adapters(build(family), family).generate(**x, **shared))


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("enabled_first", [True, False])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_learned_prompts(family, enabled_first, config):
    sizes = {"num_heads": 4, "d_kv": 8} if family == "t5" else {}  # prefix tuning needs heads that divide the width

    def adapted(model):
        torch.manual_seed(6)
        return loud(
            get_peft_model(model, config(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=4)), "prompt_encoder"
        )

    x = inputs(b=3)
    stock = adapted(build(family, **sizes))
    ours = adapted(pid.enable(build(family, **sizes))) if enabled_first else pid.enable(adapted(build(family, **sizes)))
    for kwargs in (BEAMS, {**BEAMS, "num_beams": 1}):
        assert torch.equal(
            ours.generate(**x, **kwargs), decided(stock, lambda kwargs=kwargs: stock.generate(**x, **kwargs))
        )
    pid.disable(ours)
    assert torch.equal(ours.generate(**x, **BEAMS), stock.generate(**x, **BEAMS))
    pid.enable(ours)
    labels, index = torch.randint(4, 99, (6, 4)), torch.arange(3).repeat_interleave(2)
    assert_within_rounding(
        ours(**x, labels=labels).loss, lambda: stock(**{k: v[index] for k, v in x.items()}, labels=labels).loss
    )
    if config is PrefixTuningConfig:
        with pytest.raises(ValueError, match="PREFIX_TUNING puts keys of its own in front"):
            pid.generate(ours, prompts=[[5], [7]], **x)
        return
    ids = torch.tensor(
        [[ours.generation_config.decoder_start_token_id, 5], [ours.generation_config.decoder_start_token_id, 7]]
    ).repeat(3, 1)
    expected = decided(
        stock, lambda: stock.generate(**{k: v[index] for k, v in x.items()}, decoder_input_ids=ids, max_new_tokens=5)
    )
    got = pid.generate(ours, prompts=[[5], [7]], **x, max_new_tokens=5)
    assert torch.equal(got.output.sequences, expected)


@pytest.mark.parametrize("family", ["t5", "bart", "umt5"])
def test_autocast(family, swapped):
    """The loss equals stock's within the rounding of bfloat16, and no packed weights are used."""
    model, x = build(family), inputs()
    labels, index = torch.randint(4, 99, (6, 4)), torch.arange(3).repeat_interleave(2)

    def stock(model=model):
        return model(**{k: v[index] for k, v in x.items()}, labels=labels).loss

    truth = stock(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        expected = WithinRounding(stock, truth)
        ours = swapped(model)(**x, labels=labels).loss
        tokens = model.generate(**x, **BEAMS)
        plain = swapped(model, pack_weights=False).generate(**x, **BEAMS)
    expected.check(ours)
    assert torch.equal(tokens, plain)
    pid.enable(model).generate(**x, **BEAMS)


class Quantised(torch.Tensor):
    """A weight like torchao's: a subclass with its own matmul and without plain storage to pack."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.codes = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        plain = [x.codes * x.scale if isinstance(x, Quantised) else x for x in args]
        return function(*plain, **(kwargs or {}))


def test_quantised_weights(swapped):
    def quantised():
        model = build("bart")
        for layer in model.modules():
            if type(layer) is torch.nn.Linear and layer is not model.lm_head:
                layer.weight = torch.nn.Parameter(Quantised(layer.weight.data), requires_grad=False)
        return model

    x, stock = inputs(), quantised()
    rounding_of_logits(build("bart"))  # measured before: a quantised weight cannot be copied in float64
    assert torch.equal(
        swapped(quantised()).generate(**x, **BEAMS), decided(stock, lambda: stock.generate(**x, **BEAMS))
    )


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickles_stay_enabled(family, how):
    model, x = pid.enable(build(family)), inputs()
    tokens = decided(model, lambda: model.generate(**x, **BEAMS))
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert pid.is_enabled(twin) and torch.equal(twin.generate(**x, **BEAMS), tokens)
    pid.disable(twin)
    assert type(twin) is type(build(family)) and torch.equal(twin.generate(**x, **BEAMS), tokens)
    assert pid.is_enabled(model) and torch.equal(model.generate(**x, **BEAMS), tokens)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_attention_function_changed_afterwards(family, name):
    model, x, labels, index = (
        build(family),
        inputs(),
        torch.randint(4, 99, (6, 4)),
        torch.arange(3).repeat_interleave(2),
    )
    model.set_attn_implementation(name)
    names = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    stock = decided(model, lambda: model.generate(**x, **BEAMS))
    loss = WithinRounding(lambda: model(**{k: v[index] for k, v in x.items()}, labels=labels).loss)
    loss.check(pid.enable(model)(**x, labels=labels).loss)
    pid.disable(model)
    other = {"eager": "sdpa", "sdpa": "eager"}[name]
    model.set_attn_implementation(other)
    pid.enable(model)
    model.set_attn_implementation(name)
    assert torch.equal(model.generate(**x, **BEAMS), stock)
    model.set_attn_implementation(name)
    loss.check(model(**x, labels=labels).loss)
    model.set_attn_implementation(name)
    pid.disable(model)
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == names
    assert torch.equal(model.generate(**x, **BEAMS), stock)


def test_whisper_token_timestamps_and_long_form():
    """transformers sets "eager" inside the former; the latter's mask covers input frames, not states."""

    def whisper():
        model = build("whisper")
        settings = {
            "no_timestamps_token_id": 90,
            "alignment_heads": [[0, 0], [1, 1]],
            "is_multilingual": False,
            "return_timestamps": True,
        }
        for key, value in settings.items():
            setattr(model.generation_config, key, value)
        return model

    torch.manual_seed(1)
    short = {"input_features": torch.randn(2, 8, 40) * 3}
    long = {"input_features": torch.randn(2, 8, 100) * 3, "attention_mask": torch.ones(2, 100).long()}
    long["attention_mask"][1, 70:] = 0
    for x, kwargs in ((short, {"return_token_timestamps": True}), (long, {})):
        kwargs = {**kwargs, "num_beams": 3, "max_new_tokens": 6, "return_timestamps": True}
        model = whisper()
        stock, ours = (
            WithinRounding(lambda model=model, x=x, kwargs=kwargs: model.generate(**x, **kwargs)),
            pid.enable(whisper()),
        )
        stock.check(ours.generate(**x, **kwargs))
        pid.disable(ours)
        stock.check(ours.generate(**x, **kwargs))


def test_offloaded_weights(tmp_path):
    """accelerate keeps weights on meta outside their module's forward."""
    x, prompts = inputs(), [[5], [6, 7, 8]]
    for family in ("bart", "m2m_100", "t5"):
        expected = pid.generate(pid.enable(build(family)), prompts=prompts, **x, max_new_tokens=6).sequences
        model = pid.enable(build(family))
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert pid.generate(model, prompts=prompts, **x, max_new_tokens=6).sequences == expected
    model = pid.enable(build("bart"))
    expected = pid.generate(model, prompts=prompts, **x, max_new_tokens=6).sequences
    accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
    assert pid.generate(model, prompts=prompts, **x, max_new_tokens=6).sequences == expected


class Failing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise RuntimeError("enough")


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_threads(family):
    """One model, 8 threads: prompts of different lengths, beams, losses and failing calls, 1,000 in all."""
    model = pid.enable(build(family))
    xs = [inputs(b=1 + i % 3, n=5 + i, seed=i) for i in range(8)]
    prompts = [[[5] * (1 + (i + j) % 4) for j in range(3)] for i in range(8)]
    labels = [torch.randint(4, 99, (3 * len(x["input_ids"]), 3)) for x in xs]

    def work(i):
        with torch.no_grad():
            loss = model(**xs[i], labels=labels[i]).loss
        few = pid.generate(model, prompts=prompts[i], **xs[i], max_new_tokens=3).sequences
        with pytest.raises(RuntimeError, match="enough"):
            model.generate(**xs[i], max_new_tokens=2, logits_processor=LogitsProcessorList([Failing()]))
        return loss, few, model.generate(**xs[i], num_beams=2, max_new_tokens=3).tolist()

    expected = [work(i) for i in range(8)]
    losses = [WithinRounding(lambda x=x, y=y: model(**x, labels=y).loss) for x, y in zip(xs, labels)]
    with ThreadPoolExecutor(8) as pool:
        for i, (loss, few, beams) in enumerate(pool.map(work, list(range(8)) * 31)):
            losses[i % 8].check(loss)
            assert (few, beams) == expected[i % 8][1:]
    assert pid.disable(model) is model and not any("forward" in vars(m) for m in model.modules())


def test_calls_leave_nothing_behind():
    """Compare the live tensors after 10 and after 110 calls."""
    import gc

    model, x = pid.enable(build("t5")), inputs()

    def alive(calls):
        for _ in range(calls):
            pid.generate(model, prompts=[[5], [6, 7]], **x, max_new_tokens=2)
        gc.collect()
        return sum(torch.is_tensor(o) for o in gc.get_objects())

    alive(10)
    before = alive(1)
    assert alive(100) <= before


def test_steps_by_hand_on_a_returned_cache():
    """The keys and values in a cache that the model has filled are those of its inputs, with their lengths."""
    model, x = pid.enable(build("t5")), inputs()
    ids = torch.randint(4, 99, (6, 5))
    whole = WithinRounding(lambda: model(**x, decoder_input_ids=ids).logits[:, 3:])
    first = model(**x, decoder_input_ids=ids[:, :3], use_cache=True)
    encoded = first.encoder_last_hidden_state
    then = model(
        encoder_outputs=(encoded,),
        attention_mask=x["attention_mask"],
        decoder_input_ids=ids[:, 3:],
        past_key_values=first.past_key_values,
    )
    whole.check(then.logits)


def test_copies_are_apart():
    model, x = pid.enable(build("t5")), inputs()
    twin = copy.deepcopy(model)
    pid.disable(model)
    assert pid.is_enabled(twin) and torch.equal(twin.generate(**x, **BEAMS), model.generate(**x, **BEAMS))


@pytest.mark.parametrize("version", ["5.16.1", "5.99.0", "6.0.0"])
def test_versions_outside_of_the_range_are_refused(version, monkeypatch):
    monkeypatch.setattr(names, "TESTED", ((5, 17), (5, 24)))  # --untested-transformers changes it
    monkeypatch.setattr(names.transformers, "__version__", version)
    with pytest.raises(
        ImportError,
        match=rf"pid.enable .* 5\.17 to 5\.24, but {version} is installed: pip install 'transformers>=5\.17,<5\.25'",
    ):
        pid.enable(build("t5"))
