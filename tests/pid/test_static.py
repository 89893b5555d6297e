"""The decoding step as one graph over calls: static caches whose addresses stay, buckets of sizes, warm-up."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accuracy import WithinRounding
from models import build, decided, inputs
from transformers import CompileConfig

from peft_kernels import pid
from peft_kernels.pid import static

PROMPTS = [[[5, 6], [7, 8]], [[9, 10], [11, 12]]]
RAGGED = [[[5], [6, 7, 8], [9]], [[11, 12]]]
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}
X = {
    "whisper": {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1)) * 3},
    "text": inputs(2, 9),
}


class Graphs:
    """A backend of ``torch.compile`` that runs graphs as they are and records them, and the addresses of every run."""

    def __init__(self):
        self.graphs, self.addresses = [], []

    def __deepcopy__(self, memo):  # transformers copies its compile config
        return self

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)

        def run(*args):
            self.addresses.append([x.data_ptr() if torch.is_tensor(x) else None for x in args])
            return graph.forward(*args)

        return run


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def compiled(backend) -> dict:
    """The arguments with which ``generate`` compiles the decoding step on a CPU as it does on a GPU."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def generate(model, x, **kwargs):
    torch.manual_seed(3)
    return model.generate(**x, max_new_tokens=8, no_repeat_ngram_size=2, **kwargs)


def continued(model, x, prompts, new_tokens, **kwargs):
    return pid.generate(model, prompts=prompts, max_new_tokens=new_tokens, **x, **kwargs).output.sequences


@pytest.mark.parametrize("family", ["t5", "umt5", "bart", "pegasus", "encoder-decoder-wide"])
def test_one_graph_for_the_calls_of_a_bucket(family, graphs):
    """Documents and prompts of other lengths, other numbers of prompts, ragged prompts, and enabled once more."""
    model, eager = pid.enable(build(family), pack_weights=False), pid.enable(build(family))
    calls = [(9, PROMPTS, 8), (11, PROMPTS, 8), (30, PROMPTS, 11), (9, RAGGED, 8), (9, [[5, 6]] * 3, 4)]
    for seed, (n, prompts, new) in enumerate(calls):
        x = inputs(2, n, seed=seed)
        expected = decided(eager, lambda: continued(eager, x, prompts, new))
        assert torch.equal(continued(model, x, prompts, new, **compiled(graphs)), expected)
        if seed == 2:
            pid.enable(pid.disable(model), pack_weights=False)
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_tokens_are_those_of_the_eager_step(family, mode, graphs):
    x = X.get(family, X["text"])
    model = pid.enable(build(family), pack_weights=False)
    if mode == "greedy" and family != "whisper":
        x = {**x, "decoder_input_ids": torch.tensor([[2, 5], [2, 6], [2, 7], [2, 8]])}
    expected = decided(model, lambda: generate(model, x, **MODES[mode]))
    for _ in range(2):
        assert torch.equal(generate(model, x, **MODES[mode], **compiled(graphs)), expected)
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_keys_stay_where_they_are_and_nothing_copies_them(family, graphs):
    model = pid.enable(build(family), pack_weights=False)
    for seed, n in enumerate((9, 20)):
        generate(model, inputs(2, n, seed=seed), num_beams=3, **compiled(graphs))
    (graph,) = graphs.graphs
    attention = [node for node in graph.graph.nodes if "shared_cross_attention" in str(node.target)]
    assert len(attention) == 2
    keys = {argument for node in attention for argument in node.args[1:3]}
    assert len(keys) == 4 and all(node.op == "placeholder" for node in keys)
    assert all(set(node.users) <= set(attention) for node in keys)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    fixed = [i for i, node in enumerate(placeholders) if node in keys or "self_attention_cache" in node.name]
    assert len(fixed) > 4
    for i in fixed:
        assert len({addresses[i] for addresses in graphs.addresses}) == 1


def test_inductor_recompiles_for_no_document(graphs):
    model, eager = pid.enable(build("t5"), pack_weights=False), pid.enable(build("t5"))
    for seed, n in enumerate((9, 20)):
        x = inputs(2, n, seed=seed)
        expected = decided(eager, lambda x=x: generate(eager, x, num_beams=3))
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            assert torch.equal(generate(model, x, num_beams=3, **compiled("inductor")), expected)


def test_everything_that_is_returned_has_the_rows_of_the_streams(graphs):
    model, eager = (pid.enable(build("bart", "eager"), pack_weights=False) for _ in range(2))
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "num_beams": 3}
    asked |= {"output_attentions": True, "output_hidden_states": True}
    names = "scores", "logits", "cross_attentions", "decoder_hidden_states"

    def returned(model, **kwargs):
        output = generate(model, X["text"], **asked, **kwargs)
        return [output[name] for name in names]

    WithinRounding(lambda: returned(eager)).check(returned(model, **compiled(graphs)))


def test_a_cache_that_the_caller_keeps_keeps_its_contents(graphs):
    model = pid.enable(build("t5"), pack_weights=False)
    kwargs = {"num_beams": 3, "return_dict_in_generate": True, **compiled(graphs)}
    first = generate(model, inputs(2, 9, seed=1), **kwargs)
    layers = first.past_key_values.cross_attention_cache.layers
    before = [layer.keys.clone() for layer in layers]
    generate(model, inputs(2, 9, seed=2), **kwargs)
    assert all(torch.equal(layer.keys, x) for layer, x in zip(layers, before))


def test_threads_have_caches_of_their_own(graphs):
    model = pid.enable(build("t5"), pack_weights=False)
    documents = [inputs(2, 9 + i, seed=i) for i in range(4)]
    arguments = {"num_beams": 3, "max_new_tokens": 8}
    generate(model, documents[0], num_beams=3, **compiled(graphs))
    expected = [model.generate(**x, **arguments) for x in documents]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: model.generate(**x, **arguments, **compiled(graphs)), documents * 3))
    assert all(torch.equal(x, expected[i % 4]) for i, x in enumerate(got))


def test_autocast_has_caches_of_its_own_dtype(graphs):
    model = pid.enable(build("bart"), pack_weights=False)
    expected = decided(model, lambda: generate(model, X["text"], num_beams=3))
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            tokens = generate(model, X["text"], num_beams=3, **compiled(graphs))
        assert enabled or torch.equal(tokens, expected)  # in bfloat16 rounding may decide a token
    dtypes = [buffers.cross_attention[0].keys.dtype for buffers in model.pid_static_caches._free]
    assert sorted(map(str, dtypes)) == ["torch.bfloat16", "torch.float32"]


def test_a_deep_copy_runs_its_own_weights(graphs):
    """transformers keeps the compiled call on the model, and a deep copy keeps that of its original."""
    model = pid.enable(build("t5"), pack_weights=False)
    generate(model, X["text"], num_beams=3, **compiled(graphs))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.copy_(twin.lm_head.weight.flip(0))
    expected = decided(twin, lambda: generate(twin, X["text"], num_beams=3))
    assert torch.equal(generate(twin, X["text"], num_beams=3, **compiled(graphs)), expected)


def test_memory_is_bounded_and_belongs_to_no_copy(graphs, monkeypatch):
    monkeypatch.setattr(static, "KEPT", 2)
    model = pid.enable(build("t5"), pack_weights=False)
    for b in (1, 2, 3):
        generate(model, inputs(b, 9, mask="full"), num_beams=2, **compiled("eager"))
        torch._dynamo.reset()
    free = model.pid_static_caches._free
    assert [buffers.bucket.inputs for buffers in free] == [2, 3]
    del model._compiled_call  # transformers' own, which cannot be pickled
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.pid_static_caches._free
        assert torch.equal(generate(twin, X["text"], num_beams=3), generate(model, X["text"], num_beams=3))
    assert not hasattr(pid.disable(model), "pid_static_caches")


def test_an_error_in_a_step_gives_the_memory_back(graphs):
    model = pid.enable(build("t5"), pack_weights=False)

    def stop(input_ids, scores):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        generate(model, X["text"], num_beams=3, logits_processor=[stop], **compiled(graphs))
    assert len(model.pid_static_caches._free) == 1
    assert torch.equal(
        generate(model, X["text"], num_beams=3, **compiled(graphs)), generate(model, X["text"], num_beams=3)
    )


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_after_warmup_traffic_compiles_nothing(arguments, graphs):
    model = pid.enable(build("bart"), pack_weights=False)
    arguments |= compiled(graphs)
    assert pid.warmup(model, inputs=(2, 12), prompts=2, prompt_tokens=3, new_tokens=8, **arguments) is None
    assert len(graphs.graphs) == 1
    for n, new in ((9, 8), (12, 5)):
        continued(model, inputs(2, n), PROMPTS, new, **arguments)
    assert len(graphs.graphs) == 1


def test_warmup_of_recordings(graphs):
    model = pid.enable(build("whisper"), pack_weights=False)
    features = X["whisper"]["input_features"]
    pid.warmup(model, inputs=torch.zeros_like(features), new_tokens=8, num_beams=3, **compiled(graphs))
    generate(model, {"input_features": features}, num_beams=3, **compiled(graphs))
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"inputs": (2,), "new_tokens": 4}, r"inputs must be a shape \(b, n\) or a tensor, got \(2,\)"),
        ({"inputs": (2, 9), "new_tokens": 0}, "new_tokens must be at least 1, got 0"),
        ({"inputs": (2, 9), "new_tokens": 4, "prompts": 0}, "prompts must be at least 1, got 0"),
        ({"inputs": (2, 9), "new_tokens": 4, "prompt_tokens": -1}, "prompt_tokens must be at least 0, got -1"),
        ({"inputs": (2, 9), "new_tokens": 999}, "the decoder has 64 positions"),
    ],
)
def test_warmup_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pid.warmup(pid.enable(build("bart")), **arguments)
    with pytest.raises(ValueError, match="not enabled"):
        pid.warmup(build("bart"), **arguments)


@pytest.mark.parametrize(
    "size, step, expected",
    [(1, 8, 8), (8, 8, 8), (30, 8, 32), (33, 8, 40), (120, 8, 128), (129, 8, 160), (1500, 64, 1536)],
)
def test_sizes_are_rounded_up_by_at_most_a_quarter(size, step, expected):
    assert static.rounded_up(size, step) == expected
