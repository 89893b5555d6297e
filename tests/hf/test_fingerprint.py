"""The key of features changes with everything that they depend on, and with nothing else."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from peft_kernels.hf.fingerprint import fingerprint

SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 9,
}


def bert(kind=BertModel, seed=0, **settings):
    torch.manual_seed(seed)
    return kind(BertConfig(**SIZES, **settings)).eval()


def key(model, inputs=()):
    model = model.base_model.model if hasattr(model, "peft_config") else model
    return fingerprint(model.base_model, model.base_model, list(inputs))


def flip(x, element, bit=0):
    x.data.view(-1).view(torch.uint8)[element * x.element_size()] ^= 1 << bit


def test_one_bit_of_any_weight_or_buffer():
    model = bert()
    before = key(model)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        for element in {0, x.numel() // 2 + 1, x.numel() - 1}:
            flip(x, element)
            assert (key(model) == before) == name.startswith("pooler"), (name, element)
            flip(x, element)
    assert key(model) == before


def test_large_weights_in_full():
    model = torch.nn.Linear(700, 700)
    model.config = BertConfig(**SIZES)
    before = fingerprint(model, model, [])
    with torch.no_grad():
        model.weight[123, 457] += 1e-3
    assert fingerprint(model, model, []) != before


def test_a_pooler_that_the_checkpoint_lacks_does_not_count(tmp_path):
    bert(BertForMaskedLM).save_pretrained(tmp_path)
    models = [BertModel.from_pretrained(tmp_path) for _ in range(2)]
    assert not torch.equal(*(m.pooler.dense.weight for m in models))
    assert len({key(m) for m in models}) == 1


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda m: setattr(m.config, "transformers_version", "4.0.0"), True),
        (lambda m: setattr(m.config, "_name_or_path", "elsewhere"), True),
        (lambda m: setattr(m.config, "id2label", {0: "a", 1: "b", 2: "c"}), True),
        (lambda m: m.train(), True),
        (lambda m: setattr(m.config, "hidden_act", "relu"), False),
        (lambda m: setattr(m.config, "layer_norm_eps", 1e-5), False),
        (lambda m: m.bfloat16(), False),
    ],
)
def test_the_configuration(change, same):
    model = bert()
    before = key(model)
    change(model)
    assert (key(model) == before) == same


def test_inputs_and_autocast():
    model = bert()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = key(model)
    assert len({key(model), key(model, [1]), under_autocast}) == 3


def test_a_head_that_is_not_asked():
    models = [bert(BertForSequenceClassification) for _ in range(2)]
    with torch.no_grad():
        models[0].classifier.weight.add_(1)
    assert key(models[0]) == key(models[1])


def test_adapters():
    def lora(**options):
        return LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, **options)

    model = get_peft_model(bert(), lora(), adapter_name="a")
    model.add_adapter("b", lora())
    model.set_adapter("a")
    a, again = key(model), key(copy.deepcopy(model))
    model.set_adapter("b")
    b = key(model)
    with model.disable_adapter():
        off = key(model)
    model.set_adapter("a")
    assert a == again == key(model) and len({a, b, off}) == 3
    layer = model.base_model.model.encoder.layer[0].attention.self.query
    with torch.no_grad():  # a disabled adapter does not count
        layer.lora_B["b"].weight.add_(1)
    assert key(model) == a
    layer.scaling["a"] *= 2
    assert key(model) != a
    layer.scaling["a"] /= 2
    with torch.no_grad():
        layer.lora_B["a"].weight[0, 0] += 1
    assert key(model) != a
    unmerged = key(model)
    model.merge_adapter()
    assert key(model) != unmerged
    with torch.no_grad():
        layer.lora_B["a"].weight[0, 0] -= 1
    model.unmerge_adapter()
    with model.disable_adapter():
        assert key(model) != a


def test_weights_that_accelerate_has_offloaded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = bert()
    before = key(model)
    assert key(accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")) == before
    assert key(accelerate.disk_offload(copy.deepcopy(model), tmp_path, execution_device="cpu")) == before
    with pytest.raises(ValueError, match="lies on meta"):
        key(bert().to("meta"))
