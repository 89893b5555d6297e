"""DecT as a classifier in the manner of scikit-learn, which it does not need."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .head import CALIBRATIONS, Head, calibrated, train

FORMAT = "peft_kernels.dect classifier 1"


class DecoderTuning:
    """A classifier on the features and scores that ``dect.extract`` has taken from a frozen model.

    Decoder tuning (DecT), arXiv 2212.08408: ``q_k = -||normalise(W h) - p_k|| + r_k + score_weight * s_k`` with trained W and r and
    frozen random prototypes p; Adam on the cross-entropy of q, all texts in every epoch. The same seed gives the same classifier.

    Args:
        dim: D of W (D, H) and of the prototypes.
        lr: of Adam.
        epochs: steps, each on all texts.
        score_weight: lambda; None: 1 over the texts of a class, their mean number where classes differ. The authors take 1 for MNLI.
        calibration: of the model's scores: ``"official"``, ``"logprob"`` or ``"none"``; see ``dect.head.calibrated``.
        empty_scores: (C,) scores of the empty text, from ``dect.extract``; what the first two calibrations need.
        classes: names of the classes in the order of the scores' columns; None: 0, 1, … with scores, else the sorted labels.
        seed: of W and the prototypes.

    ``sklearn.base.clone`` and ``cross_val_score`` take it; the latter passes no scores on.
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
        seed: int = 0,
    ):
        self.dim, self.lr, self.epochs, self.score_weight, self.seed = dim, lr, epochs, score_weight, seed
        self.calibration, self.empty_scores, self.classes = calibration, empty_scores, classes

    def fit(self, features, labels, scores=None) -> "DecoderTuning":
        """Train on ``features`` (N, H), ``labels`` (N,) of any kind and, if there are any, the model's ``scores`` (N, C).

        Tensors (trained on their device), arrays or lists. Sets ``classes_``, ``head_``, ``losses_`` (of every epoch), ``score_weight_``
        and ``n_features_in_``.

        Raises:
            ValueError: shapes that do not fit, features or scores that are not finite, a label outside the classes, a class without
                texts, an unknown calibration, or scores to be calibrated without ``empty_scores``.
        """
        if self.calibration not in CALIBRATIONS:
            raise ValueError(f"DecoderTuning: calibration must be one of {list(CALIBRATIONS)}, got {self.calibration!r}")
        for name, least in (("dim", 1), ("epochs", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"DecoderTuning: {name} must be at least {least}, got {getattr(self, name)}")
        features = _matrix("features", features)
        if not len(features):
            raise ValueError("DecoderTuning: features must have at least one row, got none")
        labels = _array(labels)
        if labels.shape != (len(features),):
            raise ValueError(f"DecoderTuning: labels must be ({len(features)},), one for each row of features, got {labels.shape}")
        scores = scores if scores is None else _matrix("scores", scores).to(features.device)
        self.classes_ = self._classes(labels, scores)
        indices = self._indices(labels)
        counts = np.bincount(indices, minlength=len(self.classes_))
        if not counts.all():
            raise ValueError(f"DecoderTuning: every class must have a text, got none for {self.classes_[counts == 0].tolist()}")
        self.n_features_in_, self.takes_scores_ = features.shape[1], scores is not None
        self.score_weight_ = len(self.classes_) / len(features) if self.score_weight is None else float(self.score_weight)
        self.head_, self.losses_ = train(
            features,
            torch.from_numpy(indices).to(features.device),
            self._calibrated(scores, len(features)),
            len(self.classes_),
            dim=self.dim,
            lr=self.lr,
            epochs=self.epochs,
            score_weight=self.score_weight_,
            seed=self.seed,
        )
        return self

    def decision_function(self, features, scores=None) -> Tensor:
        """q, (N, C) float32, on the device that the classifier was trained on.

        Raises:
            ValueError: not fitted, shapes that do not fit, values that are not finite, or scores given to a classifier that was
                trained without, or the reverse.
        """
        if not hasattr(self, "head_"):
            raise ValueError("DecoderTuning: fit must come first")
        device = self.head_.radius.device
        features = _matrix("features", features).to(device)
        if features.shape[1] != self.n_features_in_:
            raise ValueError(f"DecoderTuning: features must be (N, {self.n_features_in_}) as in fit, got {tuple(features.shape)}")
        if (scores is not None) != self.takes_scores_:
            raise ValueError(f"DecoderTuning: fit was called {'with' if self.takes_scores_ else 'without'} scores, and so must be this")
        scores = scores if scores is None else _matrix("scores", scores).to(device)
        return self.head_(features, self._calibrated(scores, len(features)), self.score_weight_)

    def predict(self, features, scores=None) -> np.ndarray:
        """(N,) of ``classes_``."""
        best = self.decision_function(features, scores).argmax(1)
        return self.classes_[best.cpu().numpy()]

    def predict_proba(self, features, scores=None) -> np.ndarray:
        """(N, C)"""
        return self.decision_function(features, scores).softmax(1).cpu().numpy()

    def score(self, features, labels, scores=None) -> float:
        """Accuracy."""
        return float((self.predict(features, scores) == _array(labels)).mean())

    def save(self, path: str | Path) -> None:
        """The fitted classifier as one safetensors file."""
        if not hasattr(self, "head_"):
            raise ValueError("DecoderTuning: fit must come before save")
        tensors = {name: x.cpu().contiguous() for name, x in vars(self.head_).items()}
        if self.empty_scores is not None:
            tensors["empty_scores"] = _vector(self.empty_scores).cpu().contiguous()
        parameters = {k: v for k, v in self.get_params().items() if k != "empty_scores"}
        parameters["classes"] = None if self.classes is None else self.classes_.tolist()
        fitted = {"classes": self.classes_.tolist(), "takes_scores": self.takes_scores_, "score_weight": self.score_weight_}
        save_file(tensors, path, metadata={"format": FORMAT, "parameters": json.dumps(parameters), "fitted": json.dumps(fitted)})

    @classmethod
    def load(cls, path: str | Path) -> "DecoderTuning":
        """What ``save`` wrote, on the CPU."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"DecoderTuning: {path} was not written by save")
        tensors = load_file(path)
        self = cls(**json.loads(metadata["parameters"]), empty_scores=tensors.pop("empty_scores", None))
        fitted = json.loads(metadata["fitted"])
        self.head_ = Head(**tensors)
        self.classes_, self.n_features_in_ = np.asarray(fitted["classes"]), self.head_.projection.shape[1]
        self.takes_scores_, self.score_weight_ = fitted["takes_scores"], fitted["score_weight"]
        return self

    def get_params(self, deep: bool = True) -> dict:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **parameters) -> "DecoderTuning":
        for name, value in parameters.items():
            if name not in inspect.signature(type(self)).parameters:
                raise ValueError(f"DecoderTuning: no parameter is called {name!r}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return f"DecoderTuning({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"

    def __sklearn_tags__(self):
        """How scikit-learn asks what this is."""
        from sklearn.utils import ClassifierTags, Tags, TargetTags

        return Tags("classifier", TargetTags(required=True), None, ClassifierTags(), None)

    def _classes(self, labels: np.ndarray, scores: Tensor | None) -> np.ndarray:
        columns = None if scores is None else scores.shape[1]
        if self.classes is None:
            return np.unique(labels) if scores is None else np.arange(columns)
        classes = np.asarray(list(self.classes))
        if len(np.unique(classes)) != len(classes) or columns not in (None, len(classes)):
            raise ValueError(f"DecoderTuning: classes must name {columns or 'all'} classes, each once, got {classes.tolist()}")
        return classes

    def _indices(self, labels: np.ndarray) -> np.ndarray:
        index = {name: i for i, name in enumerate(self.classes_.tolist())}
        if unknown := sorted({str(x) for x in labels.tolist() if x not in index}):
            raise ValueError(f"DecoderTuning: labels must be among the classes {self.classes_.tolist()}, got {', '.join(unknown)}")
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
            raise ValueError(f"DecoderTuning: calibration={self.calibration!r} needs empty_scores, the scores of the empty text, from extract")
        empty = _vector(self.empty_scores).to(scores.device)
        if empty.shape != (classes,) or not empty.isfinite().all():
            raise ValueError(f"DecoderTuning: empty_scores must be {classes} finite numbers, got {empty.tolist()}")
        return calibrated(scores, empty, self.calibration)


def _array(x) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _vector(x) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float32).detach()


def _matrix(name: str, x) -> Tensor:
    x = _vector(x)
    if x.ndim != 2:
        raise ValueError(f"DecoderTuning: {name} must be a matrix, got {tuple(x.shape)}")
    if not x.isfinite().all():
        row = int((~x.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"DecoderTuning: {name} must be finite, got NaN or infinity in row {row}")
    return x
