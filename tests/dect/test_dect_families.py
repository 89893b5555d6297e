"""Features and scores of every family against full logits of the stock model."""

from functools import partial

import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from dect_models import MASKED, MODELS, TEXTS, WORDS, by_hand, make

from peft_kernels.dect import extract
from peft_kernels.dect.extraction import decoder_ids_for, padded, template_for
from peft_kernels.dect.mask_row import MaskRow


def features_and_scores(*arguments, **options):
    got = extract(*arguments, **options)
    return got.features, got.scores


def word_ids(model, t, template):
    return [[i for i in ids if i >= 0] for ids in template_for(model, t, template, None).label_ids(WORDS)]


@pytest.mark.parametrize("name", MODELS)
def test_equals_full_logits(name):
    model, t, template = make(name)
    got = extract(model, t, TEXTS, template, WORDS, batch_size=4)

    def expected():
        features, scores = by_hand(model, t, [*TEXTS, ""], template, word_ids(model, t, template))
        return features[:-1], scores[:-1], scores[-1]

    assert_within_rounding((got.features, got.scores, got.empty_scores), expected)
    assert got.features.dtype == got.scores.dtype == torch.float32 and got.empty_scores.shape == (len(WORDS),)


@pytest.mark.parametrize("name", MODELS)
def test_the_vocabulary_is_computed_for_one_row_of_one_text_at_most(name):
    model, t, template = make(name)
    filled = template_for(model, t, template, None)
    row = MaskRow(model, filled.label_ids(WORDS), decoder_ids_for(model, filled))
    texts = padded(filled.encode(["bad", "great fun", ""]), 0)
    seen = []
    layer = model.get_output_embeddings()
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    for _ in range(2):
        row(*texts)
    handle.remove()
    words = 3
    if name == "deberta-v2-new-head":  # its vocabulary projection is not a layer
        assert not row.takes_columns
    else:
        assert row.takes_columns and seen == [(1, 1, len(t)), (1, 1, words), (3, 1, words), (3, 1, words)]


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "modernbert"])
def test_leaves_the_model_as_it_was(name):
    model, t, template = make(name)
    ids = torch.randint(4, 20, (2, 7))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    before = model(**inputs).logits
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout))).eval()
    modes = [m.training for m in model.modules()]
    extract(model, t, TEXTS, template, WORDS)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.eval()(**inputs).logits, before)


@pytest.mark.parametrize("name", [*MASKED, "gpt2", "t5"])
def test_without_scores(name):
    model, t, template = make(name)
    got = extract(model, t, TEXTS, template, None)
    assert got.scores is None and got.empty_scores is None
    assert_within_rounding(got.features, lambda: extract(model, t, TEXTS, template, WORDS).features)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "gpt2", "t5"])
def test_an_encoder_without_a_head(name):
    model, t, template = make(name)
    bare = make(name, "Model")[0]
    bare.load_state_dict(model.state_dict() if name == "t5" else model.base_model.state_dict(), strict=False)
    assert_within_rounding(
        extract(bare, t, TEXTS, template, None).features, lambda: extract(model, t, TEXTS, template, None).features
    )
    with pytest.raises(ValueError, match="Model has no language model head, so label_words must be None"):
        extract(bare, t, TEXTS, template, WORDS)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "t5"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_any_batch_size_in_the_order_of_the_texts(name, batch_size):
    model, t, template = make(name)
    got, expected = (
        partial(features_and_scores, model, t, TEXTS, template, WORDS, batch_size=n) for n in (batch_size, 3)
    )
    assert_within_rounding(got(), expected)


def test_bfloat16():
    model, t, template = make("roberta")
    words = word_ids(model, t, template)
    truth = by_hand(model, t, TEXTS, template, words)
    got = features_and_scores(model.bfloat16(), t, TEXTS, template, WORDS)
    assert all(x.dtype == torch.float32 for x in got)
    assert_within_rounding(got, lambda: by_hand(model, t, TEXTS, template, words), truth)


def test_no_text():
    model, t, template = make("bert")
    got = extract(model, t, [], template, WORDS)
    assert got.features.shape == (0, 32) and got.scores.shape == (0, 2) and got.empty_scores.isfinite().all()


def test_a_layer_that_somebody_wrapped_falls_back_to_full_logits():
    model, t, template = make("bert")
    expected = WithinRounding(lambda: extract(model, t, TEXTS, template, WORDS).scores)

    class Wrapped(torch.nn.Linear):
        pass

    model.get_output_embeddings().__class__ = Wrapped
    got = extract(model, t, TEXTS, template, WORDS)
    expected.check(got.scores)


def test_a_head_that_looks_at_the_whole_vocabulary_falls_back_to_full_logits():
    model, t, template = make("gpt2")
    words, forward = word_ids(model, t, template), model.forward

    def normalised(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.log_softmax(-1)
        return output

    model.forward = normalised
    got = extract(model, t, TEXTS, template, WORDS)
    assert (got.scores < 0).all()
    assert_within_rounding(got.scores, lambda: by_hand(model, t, TEXTS, template, words)[1])
