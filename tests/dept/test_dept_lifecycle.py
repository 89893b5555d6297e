"""Save and load, disable, several adapters, mixed batches, unload."""

import copy
import subprocess
import sys

import dept_models as models
import pytest
import torch
from accuracy import WithinRounding, assert_same_tokens, assert_within_rounding
from peft import PeftModel, get_peft_model

ONE_PER_KIND = [
    "t5",
    "bart",
    "gpt2",
    "llama",
    "bert-sequence",
    "roberta-qa",
    "llama-token",
    "t5-encoder",
    "gpt2-untyped",
]


def _out(model, x, labels=None, **kwargs):
    output = model(**x, **(labels or {}), **kwargs)
    return next(output[k] for k in ("logits", "start_logits", "last_hidden_state") if k in output)


def _labels(name, x):
    return models.targets(name, x) if name in models.ENCODER_DECODER else {}


@pytest.mark.parametrize("name", ONE_PER_KIND)
def test_save_and_load(name, tmp_path):
    base, model = models.pair(name)
    x = models.inputs()
    labels = _labels(name, x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(models.parameters(loaded), models.parameters(model)))
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert_within_rounding(_out(trainable, x, labels), lambda: _out(model, x, labels))
    assert_within_rounding(_out(loaded, x, labels), lambda: _out(model, x, labels))
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_load_without_allocating_first(tmp_path):
    base, model = models.pair("t5")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base.to(torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    assert all(
        torch.equal(p, q) and q.dtype == torch.float32
        for p, q in zip(models.parameters(model), models.parameters(loaded))
    )


def test_saved_configuration_is_complete(tmp_path):
    model = models.adapted("bert-sequence")
    model.save_pretrained(tmp_path)
    config = models.DePTConfig.from_pretrained(tmp_path)
    assert (config.num_virtual_tokens, config.r, config.max_length) == (models.M, models.R, models.S)
    assert config.insert_after_first is True and config.scale == 8 / models.R**0.5


@torch.no_grad()  # with gradients, attention uses another kernel for a T5 with trainable weights
@pytest.mark.parametrize("name", ONE_PER_KIND)
def test_disabled_is_stock(name):
    stock, model = models.pair(name)
    x = models.inputs()
    labels = _labels(name, x)
    expected = WithinRounding(lambda: _out(stock, x, labels))
    with model.disable_adapter():
        expected.check(_out(model, x, labels))
        if stock.can_generate():
            kwargs = {"max_new_tokens": 4, "pad_token_id": 0}
            assert_same_tokens(model.generate(**x, **kwargs), lambda: stock.generate(**x, **kwargs))
    assert not torch.equal(_out(model, x, labels), _out(stock, x, labels))


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_PER_KIND)
def test_unload_leaves_the_stock_model(name):
    stock, model = models.pair(name)
    base = model.unload()
    x = models.inputs()
    labels = _labels(name, x)
    assert type(base) is type(stock)
    assert base.state_dict().keys() == stock.state_dict().keys()
    assert (
        set(vars(base)) - set(vars(stock)) <= {"_old_forward"}
        and not base._forward_hooks
        and not base._forward_pre_hooks
    )
    assert_within_rounding(_out(base, x, labels), lambda: _out(stock, x, labels))
    again = models.adapted(name, base=base)
    assert not torch.equal(_out(again, x, labels), _out(stock, x, labels))


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(how):
    model = models.adapted("t5")
    with pytest.raises(NotImplementedError, match="depends on the token's position"):
        getattr(model, how)()
    assert torch.isfinite(_out(model, models.inputs(), models.targets("t5", models.inputs()))).all()


def _two(name, **config):
    base = models.stock(name)
    alone = [models.adapted(name, base=copy.deepcopy(base), seed=seed, **config) for seed in (1, 2)]
    both = models.adapted(name, base=copy.deepcopy(base), seed=1, **config)
    both.add_adapter("other", copy.deepcopy(alone[1].peft_config["default"]))
    models.fill(both, "other", 2)
    return base, alone, both


@pytest.mark.parametrize("name", ["t5", "gpt2", "bert-sequence", "bert-features"])
def test_two_adapters(name, tmp_path):
    _, alone, both = _two(name)
    x = models.inputs()
    labels = _labels(name, x)
    for adapter, reference in zip(("default", "other"), alone):
        both.set_adapter(adapter)
        if "sequence" not in name:  # its adapters have their own heads
            assert_within_rounding(_out(both, x, labels), lambda: _out(reference, x, labels))
        assert all(p.requires_grad for p in models.parameters(both, adapter))
    assert not any(p.requires_grad for p in models.parameters(both, "default"))
    both.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.stock(name), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="second")
    loaded.set_adapter("second")
    assert_within_rounding(_out(loaded, x, labels), lambda: _out(both, x, labels))
    both.delete_adapter("other")
    assert both.active_adapters == ["default"] and list(both.base_model.model.dept.configs) == ["default"]
    if "sequence" not in name:
        assert_within_rounding(_out(both, x, labels), lambda: _out(alone[0], x, labels))


MIXED = ["default", "other", "__base__", "other", "default"]


@pytest.mark.parametrize("position", ["padded", "token"])
@pytest.mark.parametrize(
    "name", ["t5", "bart", "pegasus", "gpt2", "llama", "bert-features", "roberta-qa", "llama-token", "t5-encoder"]
)
def test_mixed_batch_equals_separate_runs(name, position):
    base, alone, both = _two(name, position=position)
    heads = [k for k in ("classifier", "score", "qa_outputs") if hasattr(base, k)]
    for head in heads:  # PEFT gives every adapter its own head and mixes those itself; here they must be equal
        state = getattr(base, head).state_dict()
        wrapper = getattr(both.base_model.model, head)
        for copied in wrapper.modules_to_save.values():
            copied.load_state_dict(state)
    x = models.inputs(b=5, n=9, padding="left" if position == "token" else "right")
    labels = _labels(name, x)
    parts, shown = {"default": alone[0], "other": alone[1]}, x["attention_mask"].bool()
    for adapter in parts:
        both.base_model.set_requires_grad(adapter, True)

    def results(rows, parameters):
        loss = sum(row.square().mean() for row, adapter in zip(rows, MIXED) if adapter != "__base__")
        return [row.detach() for row in rows], torch.autograd.grad(loss, parameters)

    def separate():
        rows = []
        for i, adapter in enumerate(MIXED):
            row, given = {k: v[i : i + 1] for k, v in x.items()}, {k: v[i : i + 1] for k, v in labels.items()}
            if adapter == "__base__" and position == "token":  # the stock model counts padding: compare without
                rows.append(_out(base, {k: v[:, shown[i]] for k, v in row.items()}, given)[0])
            else:
                out = _out(parts.get(adapter, base), row, given)[0]
                rows.append(out if labels else out[shown[i]])
        return results(rows, [p for reference in parts.values() for p in models.parameters(reference)])

    got = _out(both, x, labels, adapter_names=MIXED)
    rows = [row if labels else row[kept] for row, kept in zip(got, shown)]
    assert_within_rounding(results(rows, [p for adapter in parts for p in models.parameters(both, adapter)]), separate)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "llama"])
def test_mixed_batch_generates_what_separate_runs_do(name, num_beams):
    base, alone, both = _two(name, max_length=30)
    x = models.inputs(b=5, padding="none")
    kwargs = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "num_beams": num_beams}
    got = both.generate(**x, adapter_names=MIXED, **kwargs)
    parts = {"default": alone[0], "other": alone[1]}
    rows = [{k: v[i : i + 1] for k, v in x.items()} for i in range(len(MIXED))]
    assert_same_tokens(
        got,
        lambda: torch.cat([parts.get(adapter, base).generate(**row, **kwargs) for adapter, row in zip(MIXED, rows)]),
    )


def test_base_rows_alone_are_stock():
    stock, model = models.pair("gpt2")
    x = models.inputs()
    assert_within_rounding(model(**x, adapter_names=["__base__"] * 3).logits, lambda: stock(**x).logits)


def test_base_model_saves_and_ties_as_before(tmp_path):
    """The embedding is not wrapped: T5 ties it and saves it under its own name."""
    model = models.adapted("t5")
    base = model.unload()
    base.save_pretrained(tmp_path)
    assert torch.equal(type(base).from_pretrained(tmp_path).shared.weight, base.shared.weight)


def test_resized_embeddings():
    stock, model = models.pair("t5")
    for m in (stock, model.base_model.model):
        torch.manual_seed(0)
        m.resize_token_embeddings(models.VOCAB + 8)
    x = models.inputs()
    x["input_ids"][0, 0] = models.VOCAB + 3
    labels = models.targets("t5", x)
    assert_within_rounding(
        model(**x, **labels).logits, lambda: models.by_formula("t5", stock, models.parameters(model), x, labels).logits
    )


def test_another_method_after_unloading():
    from peft import LoraConfig

    model = models.adapted("gpt2")
    lora = get_peft_model(model.unload(), LoraConfig(task_type="CAUSAL_LM"))
    assert torch.isfinite(lora(**models.inputs()).logits).all()


def test_import_needs_torch_only():
    code = (
        "import sys, peft_kernels; assert not {'transformers', 'peft'} & set(sys.modules);from peft_kernels import"
        " DePTConfig; import peft; assert 'DEPT' in peft.PeftType.__members__; peft_kernels.__version__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
