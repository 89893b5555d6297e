"""Trainer on cached features and on token ids."""

import pytest
import torch
import ytuning_tiny as tiny
from accuracy import assert_within_rounding
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from peft_kernels.ytuning import CachedFeatures, FeatureCollator, cache_features


def _arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder), num_train_epochs=6, per_device_train_batch_size=8, learning_rate=3e-3,
        report_to="none", disable_tqdm=True,
        logging_steps=1, seed=0, use_cpu=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["features", "input_ids"])
def test_a_short_run(form, tmp_path):
    texts, labels = tiny.texts(64)
    tokenizer, backbone = tiny.tokenizer(tmp_path), tiny.backbone()
    backbone.save_pretrained(tmp_path / "backbone")
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    model = tiny.model(num_labels=2, backbone=str(tmp_path / "backbone"))
    if form == "features":
        data = CachedFeatures(
            cache_features(backbone, tokenizer, texts, tmp_path / "cache", dtype=torch.float32), labels
        )
        collator = FeatureCollator()
    else:
        data = [{"input_ids": tokenizer(text)["input_ids"], "labels": label} for text, label in zip(texts, labels)]
        collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(
        model=model, args=_arguments(tmp_path / "out"), train_dataset=data, eval_dataset=data, data_collator=collator
    )
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    predictions = trainer.predict(data)
    assert predictions.metrics["test_loss"] < 0.5 * first
    assert predictions.predictions.shape == (64, 2)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    loaded = Trainer(model=again, args=_arguments(tmp_path / "out"), data_collator=collator).predict(data).predictions
    assert_within_rounding(torch.tensor(loaded), lambda: torch.tensor(trainer.predict(data).predictions))
    if form == "input_ids":
        after = trainer.model.frozen_backbone.model
        assert not after.training and all(torch.equal(x, before[name]) for name, x in after.state_dict().items())


def test_both_forms_train_alike(tmp_path):
    """The same rows in the same order give the same features, and the same updates up to rounding."""
    texts, labels = tiny.texts(16)
    tokenizer, backbone = tiny.tokenizer(tmp_path), tiny.backbone()
    data = CachedFeatures(cache_features(backbone, tokenizer, texts, tmp_path / "cache", dtype=torch.float32), labels)
    from_ids = DataCollatorWithPadding(tokenizer)([{"input_ids": tokenizer(t)["input_ids"]} for t in texts])

    def gradients(batch):
        model = tiny.model(num_labels=2)
        model.set_backbone(backbone)
        model(**batch).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    rows = {**from_ids, "labels": torch.tensor(labels)}
    assert_within_rounding(gradients(FeatureCollator()([data[i] for i in range(16)])), lambda: gradients(rows))
