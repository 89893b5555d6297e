"""One model used by many threads, as a server does: every answer is that of a single thread, and the model does not
change.

Answers agree within rounding: libraries may split a sum among as many threads as are free.
"""

import gc

import pytest
import torch
from accuracy import WithinRounding
from dect_models import TEXTS, WORDS, make, trained
from threads import in_threads

from peft_kernels.dect import extract


def untouched(model):
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_a_classifier_serves_threads(name):
    model, t, _ = trained(name)
    rows = [t(text, return_tensors="pt")["input_ids"] for text in model.prepare(TEXTS, t)]
    expected = [WithinRounding(lambda ids=ids: model(ids).logits) for ids in rows]
    stock = {"input_ids": rows[0]} | ({"decoder_input_ids": rows[0]} if name == "t5" else {})
    logits = WithinRounding(lambda: model.backbone(**stock).logits)
    calls = 125 if name == "bert" else 20

    def serve(number):
        for step in range(calls):
            i = (number + step) % len(rows)
            if number == 0:  # this thread uses the backbone itself
                logits.check(model.backbone(**stock).logits)
            expected[i].check(model(rows[i]).logits)

    serve(1)
    gc.collect()
    objects = len(gc.get_objects())
    in_threads(8, serve)
    gc.collect()
    assert len(gc.get_objects()) < objects + calls, "a call leaves objects behind"
    assert untouched(model.backbone)


def test_extraction_in_threads():
    model, t, template = make("bert")
    model.train()
    texts = [TEXTS[number:] + TEXTS[:number] for number in range(6)]

    def answer(of, **options):
        got = extract(model, t, of, template, WORDS, **options)
        return got.features, got.scores

    expected = [WithinRounding(lambda of=of: answer(of)) for of in texts]

    def work(number):
        for _ in range(3):
            expected[number].check(answer(texts[number], batch_size=2))

    in_threads(6, work)
    assert untouched(model) and all(m.training for m in model.modules())


def test_an_error_leaves_the_backbone_as_it_was():
    model, t, _ = trained("bert")
    ids = t(model.prepare(TEXTS[:1], t), return_tensors="pt")["input_ids"]
    expected = model(ids).logits
    stock = model.backbone(input_ids=ids).logits
    handle = model.backbone.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    handle.remove()
    assert untouched(model.backbone)
    assert torch.equal(model.backbone(input_ids=ids).logits, stock) and torch.equal(model(ids).logits, expected)
