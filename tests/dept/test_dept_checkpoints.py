"""The authors' checkpoints.

PEFT_KERNELS_DEPT_CHECKPOINT names a folder with a real one; without it, one of the same format is generated.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from accuracy import assert_within_rounding
from dept_models import widened
from peft import PeftModel, get_peft_model, set_peft_model_state_dict

from peft_kernels import dept

WIDTH, M, R, S = 768, 60, 30, 256


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    if folder := os.environ.get("PEFT_KERNELS_DEPT_CHECKPOINT"):
        return folder
    folder = tmp_path_factory.mktemp("official")
    config = {
        "base_model_name_or_path": "t5-base",
        "lora_alpha": 8,
        "max_length": S,
        "num_virtual_tokens": M,
        "peft_type": "PROMPT_TUNING_LORA",
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Is this text positive?",
        "r": R,
        "task_type": "SEQ_2_SEQ_LM",
        "token_dim": WIDTH,
        "tokenizer_name_or_path": "t5-base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = {
        "prompt_embeddings": torch.randn(M, WIDTH),
        "prompt_encoder.lora_embedding_A": torch.randn(S, R),
        "prompt_encoder.lora_embedding_B": torch.randn(R, WIDTH),
    }
    torch.save(weights, folder / "adapter_model.bin")
    return folder


def _weights(folder):
    return torch.load(Path(folder) / "adapter_model.bin", map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def t5():
    """As wide as T5-base, with one layer and a small vocabulary: only the encoder's input is checked."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=500, d_model=WIDTH, d_kv=64, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def _encoder_inputs(model, ids):
    seen = []
    encoder = model.get_base_model().get_encoder()
    handle = encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids, labels=ids[:, :2].contiguous())
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("length", [1, 64, 256])
def test_converted_checkpoint_is_the_official_formula(official, t5, tmp_path, length):
    dept.convert_official(official, tmp_path)
    model = PeftModel.from_pretrained(t5, tmp_path)
    weights = _weights(official)
    p, a, b = (
        weights[k] for k in ("prompt_embeddings", "prompt_encoder.lora_embedding_A", "prompt_encoder.lora_embedding_B")
    )
    layer = model.base_model.model.dept
    for got, expected in zip((layer.dept_prompt, layer.dept_a, layer.dept_b), (p, a, b)):
        assert torch.equal(got["default"], expected)
    ids = torch.randint(2, 500, (3, length))
    got = _encoder_inputs(model, ids)
    assert torch.equal(got[:, :M], p.expand(3, -1, -1))
    formula = t5.shared.weight.detach()[ids], p, a, b
    exact = widened(*(t.double() for t in formula), False, 8 / R**0.5)
    assert_within_rounding(got, lambda: widened(*formula, False, 8 / R**0.5), exact)
    model.unload()


def test_configuration_and_state(official, t5):
    config, state = dept.load_official(official)
    assert (config.num_virtual_tokens, config.r, config.max_length, config.task_type) == (M, R, S, "SEQ_2_SEQ_LM")
    assert config.scale == 8 / R**0.5 and config.insert_after_first is False and config.position == "padded"
    model = get_peft_model(t5, config)
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "dept" in k]
    model.unload()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c, w: c.update(peft_type="LORA"), "must be 'PROMPT_TUNING_LORA'.*got 'LORA'"),
        (lambda c, w: w.pop("prompt_embeddings"), r"\['prompt_embeddings'\] are missing"),
        (lambda c, w: c.update(max_length=128), r"lora_embedding_A must be \(128, 30\).*got \(256, 30\)"),
    ],
)
def test_other_checkpoints_are_refused(official, tmp_path, spoil, message):
    config, weights = json.loads((Path(official) / "adapter_config.json").read_text()), _weights(official)
    spoil(config, weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=message):
        dept.load_official(tmp_path)
