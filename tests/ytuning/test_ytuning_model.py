"""The label blocks: their results, frozen parameters, and saved files."""

import copy

import pytest
import torch
import ytuning_tiny as tiny
from accuracy import WithinRounding, assert_within_rounding
from torch.nn.functional import gelu, layer_norm
from transformers import AutoConfig, AutoModelForSequenceClassification

from peft_kernels.ytuning import YTuningConfig, YTuningForSequenceClassification
from peft_kernels.ytuning.model import triplet_loss


def _features(lengths=(5, 9, 2), seed=0):
    features = torch.randn(len(lengths), max(lengths), tiny.WIDTH, generator=torch.Generator().manual_seed(seed))
    return features, torch.tensor(lengths)


def _ids(lengths=(5, 9, 2), seed=0):
    ids = torch.randint(5, 45, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def _by_hand(model, features):
    """The expected result for one row, (n, d), with keys and values."""

    def attend(q, k, v):
        q, k, v = (x.unflatten(-1, (4, -1)).transpose(0, 1) for x in (q, k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    x = model.slots
    for block in model.blocks:
        cross = block.cross_attention
        parts = [
            lambda x, b=block: b.self_attention.output(attend(*b.self_attention.qkv(x).chunk(3, -1))),
            lambda x, c=cross: c.output(attend(x @ c.query().T, features @ c.key().T, features @ c.value().T)),
            lambda x, b=block: b.down(gelu(b.up(x))),
        ]
        for norm, part in zip(block.norms, parts):
            x = layer_norm(x + part(x), x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return x[1:] @ x[0]


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("labels", [1, 2, 7])
def test_the_scores(blocks, labels):
    model = tiny.model(num_blocks=blocks, num_labels=labels)
    features, lengths = _features()
    logits = model(features=features, lengths=lengths).logits
    expected = WithinRounding(lambda: torch.stack([_by_hand(model, x[:k]) for x, k in zip(features, lengths)]))
    expected.check(logits)


@pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
def test_the_losses(margin):
    scores, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1, 2, 0, 1])

    def expected():
        terms = [
            (margin + t[c] - t[y]).clamp_min(0) for t, y in zip(scores, labels.tolist()) for c in range(4) if c != y
        ]
        return sum(terms) / len(labels)

    assert_within_rounding(triplet_loss(scores, labels, margin), expected)
    features, lengths = _features()
    labels = torch.tensor([2, 0, 1])
    for loss, of in (
        ("triplet", lambda x: triplet_loss(x, labels, margin)),
        ("cross_entropy", lambda x: torch.nn.functional.cross_entropy(x, labels)),
    ):
        out = tiny.model(loss=loss, margin=margin)(features=features, lengths=lengths, labels=labels)
        assert_within_rounding(out.loss, lambda: of(out.logits.detach()))


def test_features_lengths_masks_and_ids_agree():
    model, backbone = tiny.model(), tiny.backbone()
    model.set_backbone(backbone)
    ids, mask = _ids()
    expected = WithinRounding(lambda: model(input_ids=ids, attention_mask=mask).logits)
    with torch.no_grad():
        features = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    expected.check(model(features=features, lengths=mask.sum(1)).logits)
    expected.check(model(features=features, attention_mask=mask).logits)
    expected.check(model(features=features.flip(1), attention_mask=mask.flip(1)).logits)
    expected.check(model(features=features, lengths=mask.sum(1), return_dict=False)[0])


def test_a_layer_of_the_backbone():
    model, backbone = tiny.model(backbone_layer=1), tiny.backbone()
    model.set_backbone(backbone)
    ids, mask = _ids()
    with torch.no_grad():
        features = backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    assert_within_rounding(
        model(input_ids=ids, attention_mask=mask).logits, lambda: model(features=features, attention_mask=mask).logits
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_half_the_size(dtype):
    features, lengths = _features()
    model = tiny.model()
    expected = WithinRounding(lambda: model(features=features.to(dtype).float(), lengths=lengths).logits)
    expected.check(model(features=features.to(dtype), lengths=lengths).logits)
    narrow = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        plain = WithinRounding(
            lambda: torch.stack([_by_hand(narrow, x[:k].bfloat16()) for x, k in zip(features, lengths)])
        )
    plain.check(narrow(features=features, lengths=lengths).logits)


@pytest.mark.parametrize("train", [False, True])
def test_the_backbone_stays_frozen_and_in_eval_mode(tmp_path, train):
    tiny.backbone().save_pretrained(tmp_path / "backbone")
    tiny.model(backbone=str(tmp_path / "backbone")).save_pretrained(tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").train(train)
    ids, mask = _ids()
    model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2])).loss.backward()
    backbone = model.frozen_backbone.model
    assert not any(module.training for module in backbone.modules())
    assert all(not p.requires_grad and p.grad is None and p.device.type == "cpu" for p in backbone.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_a_checkpoint_has_the_label_blocks_alone(tmp_path):
    tiny.backbone().save_pretrained(tmp_path / "backbone")
    model = tiny.model(backbone=str(tmp_path / "backbone"), num_labels=5, loss="cross_entropy", margin=2.5)
    ids, mask = _ids()
    expected = WithinRounding(lambda: model(input_ids=ids, attention_mask=mask).logits)
    model.save_pretrained(tmp_path / "saved")
    assert all(name.startswith(("slots", "blocks.")) for name in model.state_dict())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert isinstance(loaded, YTuningForSequenceClassification)
    state = loaded.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    expected.check(loaded(input_ids=ids, attention_mask=mask).logits)
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert isinstance(config, YTuningConfig) and (config.num_labels, config.loss, config.margin) == (
        5,
        "cross_entropy",
        2.5,
    )


def test_from_config_starts_from_slots_of_unit_scale():
    model = AutoModelForSequenceClassification.from_config(tiny.model(num_labels=63, hidden_size=64).config)
    assert model.slots.shape == (64, 64) and 0.9 < model.slots.std().item() < 1.1
    assert not any(norm.bias.any() for norm in model.blocks[0].norms)


def test_copies_keep_their_backbone():
    model = tiny.model()
    model.set_backbone(tiny.backbone())
    ids, mask = _ids()
    expected = WithinRounding(lambda: model(input_ids=ids, attention_mask=mask).logits)
    expected.check(copy.deepcopy(model)(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, got 0"),
        ({"num_blocks": 0}, "num_blocks must be an integer of at least 1"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide hidden_size = 32, got 5"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must lie in \[0, 1\), got 1.0"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"margin": 0.0}, "margin must be positive, got 0.0"),
    ],
)
def test_errors_of_the_config(changed, message):
    with pytest.raises(ValueError, match=message):
        YTuningConfig(**{"hidden_size": 32, "num_attention_heads": 4, **changed})


def test_errors_of_the_call():
    model, (features, lengths), (ids, mask) = tiny.model(), _features(), _ids()
    for given, message in (
        ({}, "pass features or input_ids, got none"),
        ({"features": features, "input_ids": ids}, "got both"),
        ({"features": features, "lengths": lengths, "attention_mask": mask}, "pass lengths or attention_mask"),
        ({"features": features[..., :16]}, r"features must be \(B, n, 32\)"),
        ({"input_ids": ids}, "input_ids need a backbone"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**given)
