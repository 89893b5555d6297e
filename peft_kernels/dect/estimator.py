"""Support for scikit-learn's estimator interface: its base classes if installed, and conversion of arrays."""

import inspect
import warnings
from collections.abc import Iterator
from numbers import Real

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.exceptions import DataConversionWarning, NotFittedError
    from sklearn.utils.validation import validate_data
except ImportError:  # not installed, or older than 1.6
    NotFittedError, DataConversionWarning, validate_data = ValueError, UserWarning, None

    class ClassifierMixin:
        pass

    class BaseEstimator:
        def get_params(self, deep: bool = True) -> dict:
            return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

        def set_params(self, **parameters) -> "BaseEstimator":
            for name, value in parameters.items():
                if name not in inspect.signature(type(self)).parameters:
                    raise ValueError(f"Invalid parameter {name!r} for estimator {self!r}")
                setattr(self, name, value)
            return self

        def __repr__(self) -> str:
            return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"


Values = Tensor | ArrayLike  # pandas tables are array-like


def array_of(x) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def vector_of(x) -> Tensor:
    """``x`` as a detached float32 tensor.

    Arrays may be read-only or have negative strides, which torch does not support.
    """
    if not isinstance(x, Tensor):
        x = array_of(x)
        if x.dtype.kind == "c":
            raise ValueError("DecoderTuning: Complex data not supported")
        x = torch.from_numpy(np.array(x, dtype=np.float32, order="C"))
    return x.detach().to(torch.float32)


def matrix_of(name: str, x) -> Tensor:
    """``x`` as a finite (N, M) tensor.

    Raises:
        ValueError: it is not two-dimensional, has no columns, or has a value that is not finite.
        TypeError: it is sparse.
    """
    if hasattr(x, "tocsr") or isinstance(x, Tensor) and x.layout != torch.strided:
        raise TypeError(f"DecoderTuning: {name} must be a dense matrix, got sparse data; use .toarray()")
    x = vector_of(x)
    if x.ndim != 2:
        hint = " Reshape your data" if x.ndim < 2 else ""
        raise ValueError(f"DecoderTuning: {name} must be a matrix, got {tuple(x.shape)}.{hint}")
    if not x.shape[1]:
        raise ValueError(
            f"DecoderTuning: {name} must have columns, found array with 0 feature(s) (shape={tuple(x.shape)}) while a"
            " minimum of 1 is required."
        )
    if not x.isfinite().all():
        row = int((~x.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"DecoderTuning: {name} must be finite, got NaN or infinity in row {row}")
    return x


def same_features(estimator, features, x: Tensor, reset: bool) -> None:
    """Set or compare ``n_features_in_``, and the column names if ``features`` has any."""
    if reset:
        estimator.n_features_in_ = x.shape[1]
    elif x.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"DecoderTuning: features must be (N, {estimator.n_features_in_}) as in fit, got {tuple(x.shape)}: X has"
            f" {x.shape[1]} features, but DecoderTuning is expecting {estimator.n_features_in_} features as input"
        )
    if validate_data is not None:
        table = features if hasattr(features, "columns") else x.cpu().numpy()
        validate_data(estimator, table, reset=reset, skip_check_array=True)


def labels_of(labels, rows: int) -> np.ndarray:
    """``labels`` as a (rows,) array of any dtype.

    Raises:
        ValueError: the shape differs (one-hot rows), a label is None or NaN, or labels are numbers with a fraction.
    """
    if labels is None:
        raise ValueError(
            "DecoderTuning: fit requires y to be passed, but the target y is None: labels must be one for each row of"
            " features"
        )
    labels = array_of(list(labels) if isinstance(labels, Iterator) else labels)
    if labels.shape == (rows, 1):
        warnings.warn("A column-vector y was passed when a 1d array was expected", DataConversionWarning, stacklevel=3)
        labels = labels[:, 0]
    if labels.shape != (rows,):
        raise ValueError(f"DecoderTuning: labels must be ({rows},), one for each row of features, got {labels.shape}")
    if labels.dtype.kind in "fc" and not np.isfinite(labels).all():
        raise ValueError("DecoderTuning: labels must be classes, got NaN or inf: Input contains NaN or infinity")
    if labels.dtype.kind in "fc" and (labels != np.round(labels)).any():
        raise ValueError(
            "DecoderTuning: labels must be classes, got numbers with a fraction. Unknown label type: continuous"
        )
    if labels.dtype == object and any(x is None or x != x for x in labels):
        raise ValueError("DecoderTuning: labels must be classes, got None or NaN")
    return labels


def row_weights(sample_weight, rows: int) -> np.ndarray:
    """``sample_weight`` as (rows,) float64, at least 0 and not all 0."""
    weights = np.asarray(array_of(sample_weight), dtype=np.float64)
    if weights.ndim == 0:
        weights = np.full(rows, weights)
    if weights.shape != (rows,):
        raise ValueError(
            f"DecoderTuning: sample_weight must be ({rows},), one for each row of features, got {weights.shape}: Sample"
            " weights must be 1D"
        )
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError("DecoderTuning: sample_weight must be finite weights of at least 0, and not zero everywhere")
    return weights


def check_number(name: str, value, minimum: float, integer: bool = False) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool | np.bool_)
    if not is_number or (integer and not hasattr(value, "__index__")):
        raise ValueError(f"DecoderTuning: {name} must be {'an integer' if integer else 'a number'}, got {value!r}")
    if not value >= minimum:
        raise ValueError(f"DecoderTuning: {name} must be at least {minimum}, got {value}")
