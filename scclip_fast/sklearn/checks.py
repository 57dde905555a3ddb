"""Checks of the estimator's parameters and of tensors; scikit-learn itself checks arrays."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import chunked
from ..ops import _check
from .metrics import METRICS

if TYPE_CHECKING:
    from . import LocalOutlierFactor

ALGORITHMS = ("auto", "ball_tree", "kd_tree", "brute")


def check_parameters(model: LocalOutlierFactor) -> None:
    """Raises TypeError or ValueError for a parameter of the estimator that is not allowed."""
    _check.integer("n_neighbors", model.n_neighbors, 1)
    _check.integer("leaf_size", model.leaf_size, 1)
    if model.n_jobs is not None and not isinstance(model.n_jobs, Integral):
        raise TypeError(f"n_jobs must be None or an int, got {type(model.n_jobs).__name__}")
    for name, allowed in (("algorithm", ALGORITHMS), ("metric", ("minkowski", *METRICS))):
        if (value := getattr(model, name)) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if model.metric == "minkowski" and model.p != 2:
        raise ValueError(f'p must be 2 with metric="minkowski", got {model.p!r}')
    if model.metric_params is not None:
        raise ValueError(f"metric_params must be None, got {model.metric_params!r}")
    if isinstance(model.contamination, str):
        if model.contamination != "auto":
            raise ValueError(
                f'contamination must be "auto" or in (0, 0.5], got {model.contamination!r}'
            )
    else:
        _check.contamination(model.contamination)
    if not isinstance(model.novelty, (bool, np.bool_)):
        raise TypeError(f"novelty must be a bool, got {type(model.novelty).__name__}")


def check_tensor(X: Tensor) -> Tensor:
    """Returns X detached, as float32 or float64, if it is dense, real, (M, D) and finite."""
    if X.layout != torch.strided or X.is_complex():
        raise TypeError(f"X must be a dense real tensor, got {X.layout} of {X.dtype}")
    if X.dim() != 2 or 0 in X.shape:
        raise ValueError(
            f"X must be (n_samples, n_features) with one of each at least, got shape "
            f"{tuple(X.shape)}"
        )
    X = X.detach()
    X = X.to(chunked.compute_dtype(X)) if X.is_floating_point() else X.double()
    _check.all_finite("X", X[None])
    return X
