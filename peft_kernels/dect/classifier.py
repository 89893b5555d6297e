"""DecT as a classifier with scikit-learn's interface; scikit-learn itself is optional."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..hf import durable
from .estimator import (
    BaseEstimator,
    ClassifierMixin,
    NotFittedError,
    Values,
    array_of,
    check_number,
    labels_of,
    matrix_of,
    row_weights,
    same_features,
    vector_of,
)
from .head import CALIBRATIONS, Head, calibrated, train

FORMAT = "peft_kernels.dect classifier 1"


class DecoderTuning(ClassifierMixin, BaseEstimator):
    """A classifier on the features and scores that ``dect.extract`` computes with a frozen model.

    Decoder tuning (DecT), arXiv 2212.08408: ``q_k = -||normalise(W h) - p_k|| + r_k + score_weight * s_k`` with trained
    W and r and frozen random prototypes p; Adam on the cross-entropy of q, all texts in every epoch. The same seed
    gives the same classifier.

    Args:
        dim: D, the number of rows of W (D, H) and the width of the prototypes.
        lr: learning rate of Adam.
        epochs: number of steps, each on all texts.
        score_weight: lambda; None: C / N, 1 over the mean number of texts per class. The authors use 1 for MNLI.
        calibration: calibration of the model's scores, ``"official"``, ``"logprob"`` or ``"none"``; see
            ``dect.head.calibrated``.
        empty_scores: (C,), scores of the empty text, from ``dect.extract``; needed by the first two calibrations.
        classes: names of the classes in the order of the scores' columns; None: 0, 1, … with scores, else the sorted
            labels.
        class_weight: mapping from class to the loss weight of its texts; ``"balanced"``: N / (C * number of texts of
            the class); None: 1.
        seed: random seed of W and the prototypes.

    With scikit-learn installed, this is one of its estimators: ``check_estimator`` passes, and pipelines, searches,
    calibration and one-vs-rest accept it. They do not forward scores unless metadata routing is enabled
    (``set_fit_request(scores=True)``, and likewise for ``predict``, ``score`` and the others).
    """

    def __init__(
        self,
        *,
        dim: int = 128,
        lr: float = 0.01,
        epochs: int = 30,
        score_weight: float | None = None,
        calibration: str = "official",
        empty_scores: Tensor | Sequence[float] | None = None,
        classes: Sequence | None = None,
        class_weight: Mapping | str | None = None,
        seed: int = 0,
    ) -> None:
        self.dim, self.lr, self.epochs, self.score_weight, self.seed = dim, lr, epochs, score_weight, seed
        self.calibration, self.empty_scores = calibration, empty_scores
        self.classes, self.class_weight = classes, class_weight

    def fit(
        self, features: Values, y: Values, scores: Values | None = None, sample_weight: Values | None = None
    ) -> "DecoderTuning":
        """Train on ``features`` (N, H), labels ``y`` (N,) of any type and, optionally, the model's ``scores`` (N, C).

        Inputs are tensors (training runs on their device), arrays, tables or lists. ``sample_weight`` is (N,), at least
            0: a text of weight 2 counts as two texts, and a text of weight 0 is ignored. Sets ``classes_``, ``head_``,
            ``losses_`` (one per epoch), ``score_weight_``, ``n_features_in_`` and, for a table, ``feature_names_in_``.

        Raises:
            ValueError: shapes do not match, features or scores are not finite, a label is outside the classes or has a
                fraction, a class has no texts, the calibration is unknown, or scores are to be calibrated without
                ``empty_scores``.
            TypeError: features are sparse.
        """
        if self.calibration not in CALIBRATIONS:
            raise ValueError(
                f"DecoderTuning: calibration must be one of {list(CALIBRATIONS)}, got {self.calibration!r}"
            )
        check_number("dim", self.dim, 1, integer=True)
        check_number("epochs", self.epochs, 0, integer=True)
        check_number("lr", self.lr, 0)
        table, features = features, matrix_of("features", features)
        if not len(features):
            raise ValueError(
                "DecoderTuning: features must have at least one row, got none: 0 sample(s)"
                f" (shape={tuple(features.shape)})"
            )
        labels = labels_of(y, len(features))
        scores = None if scores is None else matrix_of("scores", scores).to(features.device)
        if scores is not None and len(scores) != len(features):
            raise ValueError(
                f"DecoderTuning: scores must be ({len(features)}, {scores.shape[1]}), got {tuple(scores.shape)}"
            )
        same_features(self, table, features, reset=True)
        weights = None if sample_weight is None else row_weights(sample_weight, len(features))
        if weights is not None and not weights.all():
            nonzero = np.flatnonzero(weights)
            labels, weights, rows = labels[nonzero], weights[nonzero], torch.from_numpy(nonzero).to(features.device)
            features, scores = features[rows], None if scores is None else scores[rows]
        self.classes_ = self._classes(labels, scores)
        indices = self._indices(labels)
        counts = np.bincount(indices, minlength=len(self.classes_))
        if not counts.all():
            raise ValueError(
                f"DecoderTuning: every class must have a text, got none for {self.classes_[counts == 0].tolist()}"
            )
        self.takes_scores_ = scores is not None
        texts = len(features) if weights is None else float(weights.sum())
        self.score_weight_ = len(self.classes_) / texts if self.score_weight is None else float(self.score_weight)
        if self.class_weight is not None:
            class_weights = self._class_weights(np.bincount(indices, weights, len(self.classes_)))
            weights = class_weights[indices] if weights is None else weights * class_weights[indices]
        self.head_, self.losses_ = train(
            features,
            torch.from_numpy(indices).to(features.device),
            self._calibrated(scores, len(features)),
            len(self.classes_),
            dim=int(self.dim),
            lr=float(self.lr),
            epochs=int(self.epochs),
            score_weight=self.score_weight_,
            seed=int(self.seed),
            weights=None if weights is None else torch.from_numpy(weights / weights.sum()).to(features),
        )
        return self

    def logits(self, features: Values, scores: Values | None = None) -> Tensor:
        """The logits q, (N, C) float32, on the device on which the classifier was trained.

        Raises:
            ValueError: the classifier is not fitted, shapes do not match, values are not finite, or scores are given to
                a classifier that was trained without them, or the reverse.
        """
        if not hasattr(self, "head_"):
            raise NotFittedError("DecoderTuning: fit must come first")
        device = self.head_.radius.device
        table, features = features, matrix_of("features", features).to(device)
        same_features(self, table, features, reset=False)
        if not len(features):
            raise ValueError(
                "DecoderTuning: features must have at least one row, got none: 0 sample(s)"
                f" (shape={tuple(features.shape)})"
            )
        if (scores is not None) != self.takes_scores_:
            mode = "with" if self.takes_scores_ else "without"
            raise ValueError(f"DecoderTuning: fit was called {mode} scores, so predictions must be {mode} scores too")
        scores = scores if scores is None else matrix_of("scores", scores).to(device)
        return self.head_(features, self._calibrated(scores, len(features)), self.score_weight_)

    def decision_function(self, features: Values, scores: Values | None = None) -> np.ndarray:
        """The logits q, (N, C) float32; with two classes, q of the second minus q of the first, (N,).

        Raises as ``logits`` does.
        """
        q = self.logits(features, scores).cpu().numpy()
        return q[:, 1] - q[:, 0] if q.shape[1] == 2 else q

    def predict(self, features: Values, scores: Values | None = None) -> np.ndarray:
        """The predicted classes, (N,), from ``classes_``."""
        indices = self.logits(features, scores).argmax(1).cpu().numpy()
        return self.classes_[indices]

    def predict_proba(self, features: Values, scores: Values | None = None) -> np.ndarray:
        """The softmax of the logits, (N, C) float32."""
        return self.logits(features, scores).softmax(1).cpu().numpy()

    def score(
        self, features: Values, y: Values, scores: Values | None = None, sample_weight: Values | None = None
    ) -> float:
        """The accuracy of the predictions for ``features`` against ``y``."""
        predicted = self.predict(features, scores)
        correct = predicted == labels_of(y, len(predicted))
        return float(np.average(correct, weights=None if sample_weight is None else array_of(sample_weight)))

    def save(self, path: str | Path) -> None:
        """Write the fitted classifier to one safetensors file.

        Raises:
            ValueError: the classifier is not fitted, or the path cannot be written.
            TypeError: a parameter or class is not a number or string.
        """
        if not hasattr(self, "head_"):
            raise NotFittedError("DecoderTuning: fit must come before save")
        tensors = {name: x.cpu().contiguous() for name, x in vars(self.head_).items()}
        if self.empty_scores is not None:
            tensors["empty_scores"] = vector_of(self.empty_scores).cpu().contiguous()
        parameters = {k: v for k, v in self.get_params().items() if k not in ("empty_scores", "class_weight")}
        parameters["classes"] = None if self.classes is None else self.classes_.tolist()
        weights = self.class_weight
        # a mapping is stored as pairs, because JSON keys are strings
        parameters["class_weight"] = [*weights.items()] if isinstance(weights, Mapping) else weights
        fitted = {
            "classes": self.classes_.tolist(),
            "takes_scores": self.takes_scores_,
            "score_weight": self.score_weight_,
        }
        try:
            text = json.dumps(parameters, default=_number)
            metadata = {"format": FORMAT, "parameters": text, "fitted": json.dumps(fitted)}
        except TypeError as error:
            raise TypeError(
                f"DecoderTuning: parameters and classes must be numbers or strings to be saved: {error}"
            ) from error
        durable.check_writable("DecoderTuning: path", Path(path))
        durable.replace(Path(path), lambda part: save_file(tensors, part, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> "DecoderTuning":
        """Read a classifier that ``save`` wrote, on the CPU."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"DecoderTuning: {path} was not written by save: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"DecoderTuning: {path} was not written by save")
        tensors = load_file(path)
        parameters = json.loads(metadata["parameters"])
        if isinstance(parameters.get("class_weight"), list):
            parameters["class_weight"] = dict(parameters["class_weight"])
        self = cls(**parameters, empty_scores=tensors.pop("empty_scores", None))
        fitted = json.loads(metadata["fitted"])
        self.head_ = Head(**tensors)
        self.classes_, self.n_features_in_ = np.asarray(fitted["classes"]), self.head_.projection.shape[1]
        self.takes_scores_, self.score_weight_ = fitted["takes_scores"], fitted["score_weight"]
        return self

    def _class_weights(self, counts: np.ndarray) -> np.ndarray:
        """The weights of the classes, (C,), from the number of texts per class, (C,)."""
        if isinstance(self.class_weight, str):
            if self.class_weight != "balanced":
                raise ValueError(
                    "DecoderTuning: class_weight must be None, 'balanced' or a mapping from class to weight, got"
                    f" {self.class_weight!r}"
                )
            return counts.sum() / (len(counts) * counts)
        if not isinstance(self.class_weight, Mapping):
            raise ValueError(
                "DecoderTuning: class_weight must be None, 'balanced' or a mapping from class to weight, got"
                f" {self.class_weight!r}"
            )
        if unknown := [k for k in self.class_weight if k not in self.classes_.tolist()]:
            raise ValueError(
                f"DecoderTuning: class_weight must be of the classes {self.classes_.tolist()}, got {unknown}"
            )
        weights = np.array([self.class_weight.get(k, 1) for k in self.classes_.tolist()], dtype=np.float64)
        if not np.isfinite(weights).all() or (weights <= 0).any():
            raise ValueError(f"DecoderTuning: class_weight must have positive finite weights, got {weights.tolist()}")
        return weights

    def _classes(self, labels: np.ndarray, scores: Tensor | None) -> np.ndarray:
        columns = None if scores is None else scores.shape[1]
        if self.classes is None:
            return np.unique(labels) if scores is None else np.arange(scores.shape[1])
        classes = np.asarray(list(self.classes))
        if len(np.unique(classes)) != len(classes) or columns not in (None, len(classes)):
            raise ValueError(
                f"DecoderTuning: classes must name {columns or 'all'} classes, each once, got {classes.tolist()}"
            )
        return classes

    def _indices(self, labels: np.ndarray) -> np.ndarray:
        index = {name: i for i, name in enumerate(self.classes_.tolist())}
        if unknown := sorted({str(x) for x in labels.tolist() if x not in index}):
            raise ValueError(
                f"DecoderTuning: labels must be among the classes {self.classes_.tolist()}, got {', '.join(unknown)}"
            )
        return np.array([index[x] for x in labels.tolist()], dtype=np.int64)

    def _calibrated(self, scores: Tensor | None, rows: int) -> Tensor | None:
        if scores is None:
            return None
        classes = len(self.classes_)
        if scores.shape != (rows, classes):
            raise ValueError(f"DecoderTuning: scores must be ({rows}, {classes}), got {tuple(scores.shape)}")
        if self.calibration == "none":
            return scores
        if self.empty_scores is None:
            raise ValueError(
                f"DecoderTuning: calibration={self.calibration!r} needs empty_scores, the scores of the empty text,"
                " from extract"
            )
        empty = vector_of(self.empty_scores).to(scores.device)
        if empty.shape != (classes,) or not empty.isfinite().all():
            raise ValueError(f"DecoderTuning: empty_scores must be {classes} finite numbers, got {empty.tolist()}")
        return calibrated(scores, empty, self.calibration)


def _number(x):
    """``x`` as a Python number or list; a search over numpy arrays sets numpy numbers as parameters."""
    if isinstance(x, np.generic | np.ndarray | Tensor):
        return x.tolist()
    raise TypeError(f"got {type(x).__name__} {x!r}")
