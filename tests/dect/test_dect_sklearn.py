"""DecoderTuning with scikit-learn's tools: estimator checks, searches, calibration, one-vs-rest, sample weights,
pickles.
"""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from accuracy import assert_within_rounding
from dect_models import plain_loop

sklearn = pytest.importorskip("sklearn")

from sklearn.calibration import CalibratedClassifierCV  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.multiclass import OneVsRestClassifier  # noqa: E402
from sklearn.utils.estimator_checks import estimator_checks_generator  # noqa: E402

from peft_kernels.dect import DecoderTuning  # noqa: E402

EXCEPTIONS = {
    "check_sample_weight_equivalence_on_dense_data": "training is float32, and the check wants the results of two ways"
    " of adding equal to 1e-7",
    "check_class_weight_classifiers": "the radius of a class starts at the spread of its features, here about 20, and"
    " thirty epochs at"
    " lr 0.01 move it by 0.3 at most, whatever the weights",
}


def data(classes=3, shots=10, width=12, spread=1.0, seed=0):
    generator = np.random.default_rng(seed)
    y = np.arange(classes).repeat(shots)
    centres = np.random.default_rng(9).normal(size=(classes, width))
    return (centres[y] + spread * generator.normal(size=(len(y), width))).astype(np.float32), y


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("estimator", "check"),
    list(estimator_checks_generator(DecoderTuning(), expected_failed_checks=EXCEPTIONS, mark="xfail")),
    ids=lambda x: getattr(getattr(x, "func", x), "__name__", None) or type(x).__name__,
)
def test_check_estimator(estimator, check):
    check(estimator)


def test_the_form_of_what_comes_back():
    for classes in (1, 2, 4):
        x, y = data(classes)
        classifier = DecoderTuning(dim=8).fit(x, y)
        decision, proba = classifier.decision_function(x), classifier.predict_proba(x)
        assert isinstance(decision, np.ndarray) and isinstance(proba, np.ndarray)
        assert decision.shape == ((len(x),) if classes == 2 else (len(x), classes)) and proba.shape == (len(x), classes)
        assert (classifier.predict(x) == proba.argmax(1)).all()
        if classes == 2:
            got = torch.from_numpy(1 / (1 + np.exp(-decision))), torch.from_numpy(proba[:, 1])
            assert_within_rounding(got, lambda: (classifier.logits(x).softmax(1)[:, 1],) * 2)


def test_meta_estimators():
    x, y = data()
    assert OneVsRestClassifier(DecoderTuning(dim=8)).fit(x, y).predict(x).shape == y.shape
    assert CalibratedClassifierCV(DecoderTuning(dim=8), cv=2).fit(x, y).predict_proba(x).shape == (len(y), 3)
    x, y = data(classes=2, shots=20)
    scores = cross_val_score(DecoderTuning(dim=8), x, y, scoring="roc_auc", cv=2)
    assert np.isfinite(scores).all() and scores.mean() > 0.8


def test_saved_after_a_search_over_numbers_of_numpy(tmp_path):
    x, y = data()
    search = GridSearchCV(
        DecoderTuning(class_weight={0: np.float64(2), 2: 1}),
        {"dim": np.array([4, 8]), "lr": np.logspace(-2, -1, 2)},
        cv=2,
    ).fit(x, y)
    assert isinstance(search.best_estimator_.dim, np.integer)
    search.best_estimator_.save(tmp_path / "x")
    loaded = DecoderTuning.load(tmp_path / "x")
    assert_within_rounding(
        torch.from_numpy(loaded.predict_proba(x)), lambda: search.best_estimator_.logits(x).softmax(1)
    )
    assert loaded.class_weight == {0: 2, 2: 1}


def test_scores_by_metadata_routing():
    x, y = data(spread=3.0)
    scores = np.eye(3, dtype=np.float32)[y] * 50  # enough to decide
    classifier = DecoderTuning(dim=8, calibration="none")
    with sklearn.config_context(enable_metadata_routing=True):
        classifier.set_fit_request(scores=True).set_score_request(scores=True)
        assert cross_val_score(classifier, x, y, params={"scores": scores}, cv=2).mean() == 1


def trained(classifier, x, y, dtype):
    """Projection, radius and losses of the plain loop, and the resulting probabilities."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    projection, radius, losses = plain_loop(classifier, x, y, None, dtype)
    z = torch.nn.functional.normalize(x.to(dtype) @ projection.T, dim=1)
    q = radius - (z[:, None] - classifier.head_.prototypes.to(dtype)).norm(dim=2)
    return projection, radius, losses, q.softmax(1)


def of(classifier, x):
    return (
        classifier.head_.projection,
        classifier.head_.radius,
        classifier.losses_,
        torch.from_numpy(classifier.predict_proba(x)),
    )


def test_weights_count_texts():
    x, y = data(classes=3, shots=6)
    weights = np.tile([0, 1, 3, 1, 2, 1], 3)
    xs, ys = x.repeat(weights, 0), y.repeat(weights)
    repeated, plain = DecoderTuning(dim=8).fit(xs, ys), DecoderTuning(dim=8).fit(x, y)
    weighted = DecoderTuning(dim=8).fit(x, y, sample_weight=weights)
    halved = DecoderTuning(dim=8).fit(x, y, sample_weight=np.full(len(y), 0.5))
    assert_within_rounding(
        of(weighted, xs), lambda: trained(repeated, xs, ys, torch.float32), trained(repeated, xs, ys, torch.float64)
    )
    assert_within_rounding(
        of(halved, x), lambda: trained(plain, x, y, torch.float32), trained(plain, x, y, torch.float64)
    )
    assert weighted.score_weight_ == repeated.score_weight_


def test_weights_of_classes():
    x, y = data(classes=2, shots=8, spread=2.0)
    keep = np.r_[0:8, 8:10]
    x, y = x[keep], y[keep]
    plain, balanced = (DecoderTuning(dim=8, class_weight=w).fit(x, y) for w in (None, "balanced"))
    named = DecoderTuning(dim=8, class_weight={0: 10 / 16, 1: 10 / 4}).fit(x, y)
    by_text = DecoderTuning(dim=8, score_weight=plain.score_weight_).fit(
        x, y, sample_weight=np.array([10 / 16, 10 / 4])[y]
    )
    assert (balanced.predict_proba(x) == named.predict_proba(x)).all()
    assert balanced.predict_proba(x)[:, 1].mean() > plain.predict_proba(x)[:, 1].mean() + 0.01
    assert (
        balanced.score_weight_ == plain.score_weight_
        and by_text.head_.projection.shape == balanced.head_.projection.shape
    )


def test_pickled():
    x, y = data()
    classifier = DecoderTuning(dim=8, empty_scores=torch.ones(3)).fit(x, y)
    got = pickle.loads(pickle.dumps(classifier)).predict_proba(x)
    assert_within_rounding(torch.from_numpy(got), lambda: classifier.logits(x).softmax(1))


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [
        (np.linspace(0, 1, 30), {}, "Unknown label type: continuous"),
        (np.eye(3)[data()[1]], {}, r"labels must be \(30,\), one for each row of features, got \(30, 3\)"),
        (None, {}, "labels must be one for each row"),
        ([None] * 30, {}, "got None or NaN"),
        (data()[1], {"sample_weight": -np.ones(30)}, "sample_weight must be finite weights of at least 0"),
        (data()[1], {"sample_weight": np.ones(3)}, r"sample_weight must be \(30,\)"),
        (data()[1], {"class_weight": "even"}, "class_weight must be None, 'balanced' or a mapping"),
        (data()[1], {"class_weight": {7: 1.0}}, r"class_weight must be of the classes \[0, 1, 2\], got \[7\]"),
        (data()[1], {"class_weight": {0: 0.0}}, "class_weight must have positive finite weights"),
        (data()[1], {"dim": 2.5}, "dim must be an integer, got 2.5"),
        (data()[1], {"lr": -1}, "lr must be at least 0"),
    ],
)
def test_errors(y, options, message):
    weights = options.pop("sample_weight", None)
    with pytest.raises(ValueError, match=message):
        DecoderTuning(**options).fit(data()[0], y, sample_weight=weights)


def test_without_scikit_learn():
    """The classifier, its parameters and its errors are the same."""
    code = """
import sys
sys.modules["sklearn"] = None
import torch
from peft_kernels.dect import DecoderTuning
classifier = DecoderTuning(dim=4).set_params(epochs=3)
x, y = torch.randn(8, 5), [0, 1] * 4
assert classifier.fit(x, y).predict(x).shape == (8,)
assert classifier.get_params()["epochs"] == 3 and "dim=4" in repr(classifier)
not_fitted = lambda: DecoderTuning().predict(x)
for call in (not_fitted, lambda: classifier.set_params(width=1), lambda: classifier.predict(x[:, :2])):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=os.getcwd(),
    )
    assert out.returncode == 0, out.stderr
    first, second, third = out.stdout.splitlines()
    assert (
        "fit must come first" in first
        and "Invalid parameter 'width'" in second
        and "features must be (N, 5) as in fit" in third
    )
