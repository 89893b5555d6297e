"""DecT as an ordinary model: saved, loaded by the Auto classes, run by a pipeline."""

import copy
import pickle

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from dect_models import TEXTS, WORDS, make
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from peft_kernels.dect import DecoderTuning, DecTForSequenceClassification, extract

LABELS = [0, 1, 1, 0, 0, 1]


def trained(name, words=WORDS, **options):
    model, t, template = make(name)
    extraction = extract(model, t, TEXTS, template, words)
    classifier = DecoderTuning(dim=8, empty_scores=extraction.empty_scores, classes=["bad", "good"], **options)
    classifier.fit(extraction.features, [classifier.classes[i] for i in LABELS], extraction.scores)
    q = classifier.logits(extraction.features, extraction.scores)
    return DecTForSequenceClassification.from_classifier(classifier, model, t, template, words), t, q


@torch.no_grad()
def logits_of(model, t):
    rows = [t(text, return_tensors="pt")["input_ids"] for text in model.prepare(TEXTS, t)]
    return torch.cat([model(input_ids=ids).logits for ids in rows])


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "gpt2", "t5"])
@pytest.mark.parametrize("words", [WORDS, None], ids=["scores", "features alone"])
def test_saved_and_loaded(name, words, tmp_path):
    model, t, q = trained(name, words)
    expected = WithinRounding(lambda: logits_of(model, t))
    expected.check(q)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, DecTForSequenceClassification)
    assert AutoConfig.from_pretrained(tmp_path).id2label == {0: "bad", 1: "good"}
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys() and all(
        torch.equal(x, state[name]) for name, x in model.state_dict().items()
    )
    expected.check(logits_of(loaded, t))


def test_pipeline():
    model, t, q = trained("bert", calibration="logprob")
    classify = pipeline("text-classification", model=model, tokenizer=t)
    for batch_size in (1, 4):
        got = classify(model.prepare(TEXTS, t), batch_size=batch_size)
        assert [x["label"] for x in got] == [["bad", "good"][i] for i in q.argmax(1)]
        assert_within_rounding(torch.tensor([x["score"] for x in got]), lambda: logits_of(model, t).softmax(1).amax(1))


def test_a_padded_batch_and_a_loss():
    model, t, q = trained("bert")
    batch = t(model.prepare(TEXTS, t), padding=True, return_tensors="pt")
    output = model(batch["input_ids"], batch["attention_mask"], labels=torch.tensor(LABELS))
    assert_within_rounding(output.logits, lambda: logits_of(model, t))
    assert_within_rounding(
        output.loss, lambda: torch.nn.functional.cross_entropy(output.logits.detach(), torch.tensor(LABELS))
    )


def test_trainer_evaluates_and_copies_agree(tmp_path):
    model, t, _ = trained("bert")
    rows = [{**t(text), "labels": label} for text, label in zip(model.prepare(TEXTS, t), LABELS)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, per_device_eval_batch_size=4
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=DataCollatorWithPadding(t)
    )
    expected = WithinRounding(lambda: logits_of(model, t))
    expected.check(torch.tensor(trainer.predict(rows).predictions))
    with pytest.raises(ValueError, match="DecTForSequenceClassification is trained by DecoderTuning.fit"):
        trainer.train()
    torch.save(model, tmp_path / "whole")
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "whole", weights_only=False),
    ):
        expected.check(logits_of(twin, t))
    with torch.autocast("cpu", torch.bfloat16):
        got = logits_of(model, t)
    assert_within_rounding(got, lambda: logits_of(model, t), dtype=torch.bfloat16)
    ids = t(model.prepare(TEXTS[:1], t), return_tensors="pt")["input_ids"]
    assert_within_rounding(torch.compile(model, backend="eager")(ids).logits, lambda: model(ids).logits)


def test_errors():
    model, t, _ = trained("bert")
    with pytest.raises(ValueError, match="row 0 has no mask: texts must be in the template"):
        model(t("a film", return_tensors="pt")["input_ids"])
    with pytest.raises(ValueError, match="classifier must be fitted, with scores if there are label_words"):
        DecTForSequenceClassification.from_classifier(DecoderTuning(), model.backbone, t, "{text} {mask}", WORDS)
