"""DePT on models with other adapters, offload, shards, copies or compilation; and arguments and outputs that count
tokens.
"""

import copy
import io
import pickle
from functools import cache

import dept_models as models
import pytest
import torch
from accuracy import WithinRounding, assert_no_near_tie, assert_same_tokens, assert_within_rounding
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DataCollatorWithFlattening, GenerationConfig, LogitsProcessorList
from transformers.generation import EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from peft_kernels import DePTConfig, pid
from peft_kernels.dept import sequences
from peft_kernels.dept.layer import DePTLayer

GENERATE = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
QUERIES = {"gpt2": "c_attn", "t5": "q", "bert-sequence": "query", "roberta-qa": "query"}


def _out(model, x):
    output = model(**x)
    return next(output[k] for k in ("logits", "start_logits") if k in output)


def _inputs(name):
    x = models.inputs(padding="none")
    return x | (models.targets(name, x) if name == "t5" else {})


def _config(name, **settings):
    return DePTConfig(
        **{
            "num_virtual_tokens": models.M,
            "r": models.R,
            "max_length": models.S,
            "task_type": models.MODELS[name][3],
            **settings,
        }
    )


def _filled(model):
    """The model after ``models.fill``, wherever the layer is."""
    layer = next(m for m in model.modules() if isinstance(m, DePTLayer))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameters in (layer.dept_prompt, layer.dept_a, layer.dept_b):
            parameters["default"].copy_(torch.randn(parameters["default"].shape, generator=generator) * 0.5)
    return model.eval()


def _with_lora(name, model, targets=None):
    model = get_peft_model(
        model, LoraConfig(target_modules=targets or [QUERIES[name]], task_type=models.MODELS[name][3], r=2)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def _expected(model, name):
    """The output of ``model``: numbers up to rounding, and tokens that rounding does not decide."""
    x, tokens = _inputs(name), None
    numbers = WithinRounding(lambda: _out(model, x))
    if "labels" in x or name == "gpt2":
        asked = {k: v for k, v in x.items() if k != "labels"}
        tokens = model.generate(**asked, **GENERATE)
        assert_no_near_tie(lambda: model.generate(**asked, **GENERATE), tokens)
    return numbers, tokens


@cache
def _adapted(name):
    return _expected(models.adapted(name), name)


def _agree(model, expected, name):
    x, (numbers, tokens) = _inputs(name), expected
    numbers.check(_out(model, x))
    if tokens is not None:
        x.pop("labels", None)
        assert torch.equal(model.generate(**x, **GENERATE), tokens)


@pytest.mark.parametrize("first", ["LoRA", "DePT"])
@pytest.mark.parametrize("name", QUERIES)
def test_lora_in_either_order(name, first):
    """The expected result: LoRA merged into the weights, and DePT on the merged weights."""
    expected = _expected(models.adapted(name, base=_with_lora(name, models.stock(name)).merge_and_unload()), name)
    if first == "LoRA":
        below = _with_lora(name, models.stock(name))
        model = _filled(get_peft_model(below, _config(name)))
    else:
        below = models.adapted(name)
        model = _with_lora(name, below)
    _agree(model, expected, name)
    if first == "LoRA":
        alone = _with_lora(name, models.stock(name))
        assert model.unload() is below
        assert_within_rounding(_out(below, _inputs(name)), lambda: _out(alone, _inputs(name)))


def test_lora_on_the_embedding():
    """Embedding rows include LoRA's update, for the input and for generated tokens."""
    model, x = _with_lora("llama", models.adapted("llama"), ["embed_tokens"]), models.inputs(padding="none")
    got, tokens = model(**x).logits, model.generate(**x, **GENERATE)
    model.merge_adapter()
    expected = WithinRounding(lambda: model(**x).logits)
    expected.check(got)
    with pytest.raises(AssertionError, match="error"):
        expected.check(models.adapted("llama")(**x).logits)
    assert_same_tokens(tokens, lambda: model.generate(**x, **GENERATE))


@pytest.mark.parametrize("order", ["below", "above"])
def test_ia3(order):
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[])
    model = models.stock("gpt2")
    model = (
        get_peft_model(get_peft_model(model, ia3), _config("gpt2"))
        if order == "below"
        else get_peft_model(models.adapted("gpt2"), ia3)
    )
    _agree(_filled(model), _adapted("gpt2"), "gpt2")  # a new IA3 changes nothing


def test_prompts_of_other_methods():
    x = models.inputs(padding="none")
    for config in (PromptTuningConfig, PrefixTuningConfig):
        other = config(task_type="CAUSAL_LM", num_virtual_tokens=7)
        with pytest.raises(ValueError, match="DePT: model has P.*_TUNING, whose prompt would be lost"):
            get_peft_model(get_peft_model(models.stock("gpt2"), other), _config("gpt2"))
        model = get_peft_model(models.adapted("gpt2"), other)
        with pytest.raises(ValueError, match="DePT: generate below P.*_TUNING would leave its prompt out"):
            model.generate(**x, **GENERATE)
    with pytest.raises(ValueError, match="past_key_values must come from this model with its adapter"):
        model(input_ids=x["input_ids"])
    with pytest.raises(ValueError, match=r"model has the DePT adapters \['default'\]"):
        get_peft_model(models.adapted("gpt2"), _config("gpt2"))


@pytest.mark.parametrize("name", ["gpt2", "bert-sequence"])
def test_the_integration_in_transformers(name, tmp_path):
    model, x = models.stock(name), models.inputs()
    try:
        model.add_adapter(_config(name))
    except ValueError as error:
        pytest.skip(str(error))  # a transformers that requires a newer PEFT
    expected, stock = (WithinRounding(lambda m=m: _out(m, x)) for m in (models.adapted(name), models.stock(name)))
    expected.check(_out(_filled(model), x))
    model.save_pretrained(tmp_path)
    loaded = models.stock(name)
    loaded.load_adapter(str(tmp_path))
    expected.check(_out(loaded.eval(), x))
    model.disable_adapters()
    stock.check(_out(model, x))
    model.enable_adapters()
    model.delete_adapter("default")
    stock.check(_out(model, x))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
@pytest.mark.parametrize("name", ["gpt2", "t5", "bert-sequence"])
def test_offload(name, how, order, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def offload(model):
        if how == "cpu":
            return accelerate.cpu_offload(model, execution_device="cpu")
        if how == "disk":
            return accelerate.disk_offload(model, tmp_path, execution_device="cpu")
        children = {key: "disk" for key, _ in model.named_children()}
        return accelerate.dispatch_model(model, device_map=children, main_device="cpu", offload_dir=tmp_path)

    if order == "before":
        model = models.adapted(name, base=offload(models.stock(name)))
    else:
        model = models.adapted(name)
        offload(model)
    with torch.no_grad():
        _agree(model, _adapted(name), name)


def test_initialisation_below_offload(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    base = accelerate.disk_offload(models.stock("gpt2"), tmp_path, execution_device="cpu")
    prompt = get_peft_model(base, _config("gpt2", init_token_ids=[7, 8])).base_model.model.dept.dept_prompt["default"]
    assert torch.equal(prompt, models.stock("gpt2").get_input_embeddings().weight[[7, 8, 7, 8, 7]])


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("bert-sequence", "bert.embeddings"),
        ("roberta-qa", "roberta.embeddings.word_embeddings"),
        ("llama", "model.embed_tokens"),
        ("t5", None),
    ],
)
def test_fsdp2(name, shard, one_rank):
    """The embedding, or the module around it, is its own shard, as accelerate's policy makes it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh, x = init_device_mesh("cpu", (1,)), _inputs(name)
    model, expected = models.adapted(name), models.adapted(name)
    if shard:
        fully_shard(model.base_model.model.get_submodule(shard), mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = _out(model, x)
    out.square().mean().backward()

    def results():
        reference = _out(expected, x)
        return reference.detach(), *torch.autograd.grad(reference.square().mean(), models.parameters(expected))

    assert_within_rounding((out.detach(), *(p.grad.full_tensor() for p in models.parameters(model))), results)
    if name in ("llama", "t5"):
        register_fsdp_forward_method(model, "generate")
        x.pop("labels", None)
        assert_same_tokens(model.generate(**x, **GENERATE), lambda: expected.generate(**x, **GENERATE))


def test_int8_weights():
    quantization = pytest.importorskip("torchao.quantization")
    stock, x = models.stock("llama"), models.inputs()
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    quantization.quantize_(
        stock, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, kinds)
    )
    model = models.adapted("llama", base=copy.deepcopy(stock))
    embeddings = stock.get_input_embeddings()(x["input_ids"])
    assert_within_rounding(
        model(**x).logits, lambda: model(inputs_embeds=embeddings, attention_mask=x["attention_mask"]).logits
    )


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert-sequence"])
def test_pickle(name):
    model = models.adapted(name)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        _agree(twin, _adapted(name), name)


def test_compiled_positions():
    """Positions are checked inside the graph."""

    def checked(positions):
        sequences.check({"position_ids": positions}, None)
        return positions + 1

    compiled, positions = torch.compile(checked, fullgraph=True, backend="eager"), torch.arange(8).expand(3, -1)
    assert torch.equal(compiled(positions), positions + 1)
    with pytest.raises(RuntimeError, match="position_ids start again within a row"):
        compiled(positions % 3)


def test_packed_sequences_are_refused():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    model = models.adapted("llama")
    for settings, message in (
        ({}, "position_ids start again within a row"),
        (
            {"return_position_ids": False, "return_flash_attn_kwargs": True},
            "cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k describe",
        ),
        ({"return_position_ids": False, "return_seq_idx": True}, "seq_idx describes several"),
    ):
        with pytest.raises(ValueError, match=f"DePT: a row must hold one sequence.*{message}"):
            model(**DataCollatorWithFlattening(**settings)(rows))
    with pytest.raises(ValueError, match="cannot take .'continuous batching'"):
        model.base_model.model.generate_batch([[5, 6, 7]])
    with pytest.raises(ValueError, match="langs of .* must be None, because it has a value for each token"):
        model(**models.inputs(), langs=torch.zeros(3, 8, dtype=torch.long))


def test_positions_of_padded_rows_are_one_sequence():
    model = models.adapted("llama", position="token")
    x = models.inputs(padding="left")
    positions = (x["attention_mask"].cumsum(1) - 1).masked_fill(x["attention_mask"] == 0, 1)
    shown = x["attention_mask"].bool()
    assert_within_rounding(model(**x, position_ids=positions).logits[shown], lambda: model(**x).logits[shown])


@pytest.mark.parametrize("keep", [0, 1, 5, 8, 10, 13, 50, torch.tensor([1, -1, 4])])
def test_logits_to_keep(keep):
    """It counts tokens, also if it exceeds their number or equals the number of columns."""
    model, x = models.adapted("gpt2"), models.inputs(padding="none")
    kept = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    assert_within_rounding(model(**x, logits_to_keep=keep).logits, lambda: model(**x).logits[:, kept])


def test_labels_as_trainer_counts_them():
    """Trainer divides by the number of labels after the first: the first label must not count then, nor in
    shift_labels.
    """
    model, x = models.adapted("gpt2"), models.inputs(padding="none")
    ids = x["input_ids"]
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    expected = WithinRounding(
        lambda: torch.nn.functional.cross_entropy(model(**x).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
    expected.check(model(**x, labels=ids, num_items_in_batch=3 * 7).loss)
    expected.check(model(**x, labels=ids, shift_labels=shifted).loss)


def test_an_input_in_chunks():
    model, ids = models.adapted("llama"), models.inputs(padding="none")["input_ids"]
    cache, parts = None, []
    for chunk in ids.split(3, 1):
        logits, cache = model(input_ids=chunk, past_key_values=cache, use_cache=True, return_dict=False)[:2]
        parts.append(logits)
    assert_within_rounding(torch.cat(parts, 1), lambda: model(input_ids=ids).logits)
    out = model.generate(input_ids=ids, **GENERATE, return_dict_in_generate=True)
    following = model(input_ids=out.sequences[:, -1:], past_key_values=out.past_key_values).logits
    assert_within_rounding(following, lambda: model(input_ids=out.sequences).logits[:, -1:])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_arguments_that_count_tokens(name):
    stock, model = models.pair(name)
    x = models.inputs(padding="none")
    embeddings = stock.get_input_embeddings()(x["input_ids"])
    for kwargs in ({"max_length": 13, "min_length": 12}, {"generation_config": GenerationConfig(max_length=11)}):
        for given in ({"input_ids": x["input_ids"]}, {"inputs_embeds": embeddings}):
            assert (
                model.generate(**given, **kwargs, pad_token_id=0).shape
                == stock.generate(**given, **kwargs, pad_token_id=0).shape
            )
    both = model.generate(input_ids=x["input_ids"], inputs_embeds=embeddings.flip(1), **GENERATE)
    assert_same_tokens(both[:, 8:], lambda: model.generate(input_ids=x["input_ids"].flip(1), **GENERATE)[:, 8:])
    for setting in ("use_mtp", "token_healing"):
        with pytest.raises(ValueError, match=rf"cannot take \['{setting}'\]"):
            model.generate(**x, **GENERATE, **{setting: True})


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("name", "length"), [("bart", 8), ("gpt2", 30)])
def test_generate_compares_with_the_tokens_of_the_input(name, length, beams):
    """The tokens are compared, not the columns of their embeddings."""
    model = models.adapted(name, max_length=40)
    x = models.inputs(n=length, padding="right" if name == "bart" else "left")
    settings = {"max_new_tokens": 6, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(**x, **settings)
    for setting, processor in (
        ({"encoder_no_repeat_ngram_size": 1}, EncoderNoRepeatNGramLogitsProcessor(1, x["input_ids"])),
        ({"encoder_repetition_penalty": 5.0}, EncoderRepetitionPenaltyLogitsProcessor(5.0, x["input_ids"])),
    ):
        got = model.generate(**x, **settings, **setting)
        assert torch.equal(got, model.generate(**x, **settings, logits_processor=LogitsProcessorList([processor])))
        assert not torch.equal(got, plain)


def test_generate_whose_rows_are_not_those_of_the_input():
    model = models.adapted("bart")
    pid.enable(model)
    x = models.inputs()
    streams = {
        "decoder_input_ids": torch.full((4, 1), 2),
        "encoder_index": torch.tensor([0, 0, 1, 2]),
        "max_new_tokens": 4,
    }
    model.generate(**x, **streams)
    with pytest.raises(
        ValueError, match=r"cannot take \['encoder_no_repeat_ngram_size'\]: .* other rows than those of input_ids"
    ):
        model.generate(**x, **streams, encoder_no_repeat_ngram_size=2)


def test_guidance_calls_the_model_within_generate():
    """With an adapter that changes nothing, the tokens are the stock model's."""
    stock, model = models.pair("llama", num_virtual_tokens=0)
    torch.nn.init.zeros_(models.parameters(model)[2])
    x = models.inputs(padding="none")
    assert_same_tokens(
        model.generate(**x, **GENERATE, guidance_scale=1.5), lambda: stock.generate(**x, **GENERATE, guidance_scale=1.5)
    )


@pytest.mark.parametrize(("padding", "position"), [("right", "padded"), ("left", "padded"), ("left", "token")])
@pytest.mark.parametrize("prompt", [0, 3])
def test_encoder_outputs(prompt, padding, position):
    """Encoder outputs come from an adapted forward, with the mask of the tokens; an encoder alone has no prompt."""
    model, x = models.adapted("t5", num_virtual_tokens=prompt, position=position), models.inputs(padding=padding)
    labels = models.targets("t5", x)
    whole = model(**x, **labels)
    states = BaseModelOutput(whole.encoder_last_hidden_state)
    again = model(encoder_outputs=states, attention_mask=x["attention_mask"], **labels)
    assert_within_rounding(again.logits, lambda: model(**x, **labels).logits)
    got = model.generate(encoder_outputs=states, attention_mask=x["attention_mask"], **GENERATE)
    assert_same_tokens(got, lambda: model.generate(**x, **GENERATE))
    states = BaseModelOutput(whole.encoder_last_hidden_state)  # generate repeats them in place
    got = model.generate(encoder_outputs=states, attention_mask=x["attention_mask"], **GENERATE, num_beams=2)
    assert_same_tokens(got, lambda: model.generate(**x, **GENERATE, num_beams=2))
    with pytest.raises(ValueError, match="DePT: T5Stack alone has no prompt; call T5ForConditionalGeneration"):
        model.get_encoder()(**x)
    with pytest.raises(ValueError, match="DePT: GPT2Model alone has no prompt"):
        models.adapted("gpt2").base_model.model.transformer(**x)


def test_hooks_on_the_embedding():
    """NEFTune's noise reaches the tokens; the hook of gradient checkpointing changes nothing."""
    model, x = models.adapted("gpt2").train(), models.inputs()

    def results():
        loss = model(**x, labels=x["input_ids"]).loss
        return loss.detach(), *torch.autograd.grad(loss, models.parameters(model))

    expected = WithinRounding(results)
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.flip(-1))
    with pytest.raises(AssertionError, match="error"):
        expected.check(results())
    handle.remove()
    model.base_model.model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    expected.check(results())


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert-sequence", "roberta-qa"])
def test_the_last_adapter_deleted(name):
    stock, model = models.pair(name)
    model.delete_adapter("default")
    _agree(model, _expected(stock, name), name)
