"""The classifier against a plain PyTorch training loop; its calibrations; saving, loading and scikit-learn."""

import numpy as np
import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from dect_models import plain_loop

from peft_kernels.dect import DecoderTuning
from peft_kernels.dect.head import calibrated


def data(shots=8, classes=3, width=24, seed=0, spread=1.0):
    """features, labels and scores of texts around one centre per class, in shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(classes).repeat(shots)[torch.randperm(shots * classes, generator=generator)]
    features = centres[labels] + spread * torch.randn(len(labels), width, generator=generator)
    scores = 2 + torch.nn.functional.one_hot(labels, classes) + torch.randn(len(labels), classes, generator=generator)
    return features, labels, scores


@pytest.mark.parametrize("shots", [1, 4, 16])
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("with_scores", [True, False])
def test_trains_as_autograd_and_adam_do(shots, classes, with_scores):
    features, labels, scores = data(shots, classes)
    scores = scores if with_scores else None
    classifier = DecoderTuning(dim=16, epochs=20, calibration="none").fit(features, labels, scores)
    truth = plain_loop(classifier, features, labels, scores)
    got = classifier.head_.projection, classifier.head_.radius, classifier.losses_
    assert_within_rounding(got, lambda: plain_loop(classifier, features, labels, scores, torch.float32), truth)


def test_the_start_is_that_of_the_paper():
    features, labels, _ = data()
    classifier = DecoderTuning(epochs=0).fit(features, labels)
    head = classifier.head_
    assert head.projection.shape == (128, 24) and head.prototypes.shape == (3, 128) and classifier.losses_.shape == (0,)
    assert head.projection.abs().max() <= 24**-0.5 < 1.02 * head.projection.abs().max()
    bound = (6 / (3 + 128)) ** 0.5
    assert head.prototypes.abs().max() <= bound < 1.05 * head.prototypes.abs().max()
    for k in range(3):

        def spread():
            of_class = features[labels == k] @ head.projection.T
            return (of_class - of_class.mean(0)).norm(dim=1).mean()

        assert_within_rounding(head.radius[k], spread)
    assert DecoderTuning(epochs=0).fit(*data(shots=1)[:2]).head_.radius.eq(0).all()
    assert classifier.score_weight_ == 1 / 8


def test_prototypes_stay():
    features, labels, _ = data()
    start, end = (DecoderTuning(epochs=n).fit(features, labels).head_ for n in (0, 30))
    assert torch.equal(start.prototypes, end.prototypes) and not torch.equal(start.projection, end.projection)


def test_learns_and_predicts():
    features, labels, scores = data(spread=0.5)
    test_features, test_labels, test_scores = data(seed=1, shots=50, spread=0.5)
    classifier = DecoderTuning(calibration="none").fit(features, labels, scores)
    assert classifier.score(test_features, test_labels, test_scores) > 0.95
    q = classifier.logits(test_features, test_scores)
    proba = classifier.predict_proba(test_features, test_scores)
    predicted = classifier.predict(test_features, test_scores)
    assert isinstance(predicted, np.ndarray) and isinstance(proba, np.ndarray) and proba.shape == (150, 3)
    assert_within_rounding(torch.from_numpy(proba), lambda: q.softmax(1))
    assert (predicted == proba.argmax(1)).all()


def test_the_same_seed_gives_the_same_classifier():
    features, labels, scores = data()
    state = torch.get_rng_state()
    first, again, other = (
        DecoderTuning(calibration="none", seed=s).fit(features, labels, scores).head_ for s in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.projection, again.projection) and not torch.equal(first.projection, other.projection)


def test_inputs_of_every_kind():
    features, labels, scores = data()
    expected = WithinRounding(lambda: DecoderTuning(calibration="none").fit(features, labels, scores).head_.projection)
    for change in (
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
    ):
        got = DecoderTuning(calibration="none").fit(*map(change, (features, labels, scores)))
        expected.check(got.head_.projection)
    expected.check(DecoderTuning(calibration="none").fit(features.double(), labels, scores).head_.projection)


def test_names_of_classes():
    features, labels, scores = data()
    names = np.array(["bad", "good", "so so"])
    by_name = DecoderTuning().fit(features, names[labels])
    assert by_name.classes_.tolist() == ["bad", "good", "so so"] and by_name.score(features, names[labels]) == 1
    order = ["so so", "bad", "good"]
    with_scores = DecoderTuning(calibration="none", classes=order).fit(features, names[labels], scores[:, [2, 0, 1]])
    plain = DecoderTuning(calibration="none").fit(features, labels, scores)
    assert with_scores.classes_.tolist() == order
    assert (with_scores.predict(features, scores[:, [2, 0, 1]]) == names[plain.predict(features, scores)]).mean() > 0.9


@pytest.mark.parametrize("calibration", ["official", "logprob", "none"])
def test_calibration(calibration):
    features, labels, scores = data()
    empty = torch.tensor([1.0, 2.0, 4.0])
    formula = {
        "official": lambda: scores / (empty / empty.mean() + 1e-15),
        "logprob": lambda: scores.log_softmax(1) - empty.log_softmax(0),
        "none": lambda: scores,
    }[calibration]
    expected = calibrated(scores, empty, calibration)
    assert_within_rounding(expected, formula)
    classifier = DecoderTuning(calibration=calibration, empty_scores=empty.tolist()).fit(features, labels, scores)
    raw = DecoderTuning(calibration="none").fit(features, labels, expected)
    assert torch.equal(classifier.head_.projection, raw.head_.projection)
    assert torch.equal(classifier.logits(features, scores), raw.logits(features, expected))


@pytest.mark.parametrize("with_scores", [True, False])
def test_saved_and_loaded(tmp_path, with_scores):
    features, labels, scores = data()
    names, scores = np.array(["bad", "good", "so so"])[labels], scores if with_scores else None
    classes = ["so so", "good", "bad"] if with_scores else None
    classifier = DecoderTuning(dim=8, empty_scores=torch.tensor([1.0, 2.0, 3.0]), classes=classes).fit(
        features, names, scores
    )
    classifier.save(tmp_path / "classifier.safetensors")
    loaded = DecoderTuning.load(tmp_path / "classifier.safetensors")
    assert torch.equal(loaded.head_.projection, classifier.head_.projection) and torch.equal(
        loaded.head_.radius, classifier.head_.radius
    )
    assert_within_rounding(loaded.logits(features, scores), lambda: classifier.logits(features, scores))
    assert (loaded.predict(features, scores) == classifier.predict(features, scores)).all()
    assert repr(loaded) == repr(classifier) and loaded.classes_.tolist() == classifier.classes_.tolist()
    assert torch.equal(loaded.fit(features, names, scores).head_.projection, classifier.head_.projection)


def test_loads_nothing_else(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match="was not written by save"):
        DecoderTuning.load(tmp_path / "x")


def test_parameters():
    classifier = DecoderTuning(dim=5).set_params(lr=0.1, epochs=3)
    assert classifier.get_params() | {"dim": 5, "lr": 0.1, "epochs": 3} == classifier.get_params()
    with pytest.raises(ValueError, match="Invalid parameter 'width'"):
        classifier.set_params(width=3)


def test_scikit_learn():
    sklearn = pytest.importorskip("sklearn")
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels, _ = (x.numpy() for x in data(spread=0.5))
    classifier = DecoderTuning(dim=16, empty_scores=torch.ones(3))
    copied = sklearn.base.clone(classifier)
    assert repr(copied) == repr(classifier) and sklearn.base.is_classifier(classifier)
    assert cross_val_score(classifier, features, labels, cv=4).mean() > 0.9
    assert make_pipeline(StandardScaler(), classifier).fit(features, labels).score(features, labels) == 1
    assert GridSearchCV(classifier, {"dim": [8, 16]}, cv=2).fit(features, labels).best_params_["dim"] in (8, 16)


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"features": torch.zeros(24)}, {}, r"features must be a matrix, got \(24,\)"),
        ({"features": torch.zeros(0, 24), "y": []}, {}, "features must have at least one row"),
        ({"features": torch.full((24, 24), torch.nan)}, {}, "features must be finite, got NaN or infinity in row 0"),
        ({"y": [0, 1, 2]}, {}, r"labels must be \(24,\), one for each row of features, got \(3,\)"),
        ({"y": [0, 1, 3] * 8}, {}, r"labels must be among the classes \[0, 1, 2\], got 3"),
        (
            {"y": ["a", "b", "c"] * 8},
            {"classes": ["a", "b", "d"]},
            r"labels must be among the classes \['a', 'b', 'd'\], got c",
        ),
        ({"y": [0, 1, 0] * 8}, {}, r"every class must have a text, got none for \[2\]"),
        ({"scores": torch.zeros(24)}, {}, r"scores must be a matrix, got \(24,\)"),
        ({"scores": torch.zeros(23, 3)}, {}, r"scores must be \(24, 3\), got \(23, 3\)"),
        ({"scores": torch.full((24, 3), torch.inf)}, {}, "scores must be finite"),
        ({}, {"classes": ["a", "b"]}, "classes must name 3 classes, each once"),
        ({}, {"classes": [0, 1, 1]}, "classes must name 3 classes, each once"),
        ({}, {"calibration": "official"}, "calibration='official' needs empty_scores"),
        ({}, {"calibration": "logprob", "empty_scores": [1.0]}, r"empty_scores must be 3 finite numbers, got \[1.0\]"),
        ({}, {"calibration": "best"}, "calibration must be one of"),
        ({}, {"dim": 0}, "dim must be at least 1, got 0"),
        ({}, {"epochs": -1}, "epochs must be at least 0, got -1"),
    ],
)
def test_errors(changed, options, message):
    arguments = dict(zip(("features", "y", "scores"), data())) | changed
    with pytest.raises(ValueError, match=message):
        DecoderTuning(**{"calibration": "none"} | options).fit(**arguments)


def test_errors_of_predict(tmp_path):
    features, labels, scores = data()
    classifier = DecoderTuning(calibration="none")
    for call in (lambda: classifier.predict(features), lambda: classifier.save(tmp_path / "x")):
        with pytest.raises(ValueError, match="fit must come"):
            call()
    with_scores, without = (DecoderTuning(calibration="none").fit(features, labels, s) for s in (scores, None))
    with pytest.raises(ValueError, match="fit was called with scores"):
        with_scores.predict(features)
    with pytest.raises(ValueError, match="fit was called without scores"):
        without.predict(features, scores)
    with pytest.raises(ValueError, match=r"features must be \(N, 24\) as in fit, got \(24, 23\)"):
        without.predict(features[:, :23])
    with pytest.raises(ValueError, match="features must be finite"):
        without.predict(features / 0)
