"""The Local Outlier Factor with scikit-learn's API, on numpy arrays and on tensors of any device.

Needs the extra `sklearn` (scikit-learn 1.6 or newer).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import chunked, reference
from .extras import needs
from .metrics import METRICS, nearest
from .ops import _check

with needs("sklearn"):
    import numpy as np
    from sklearn.base import BaseEstimator, OutlierMixin
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.validation import check_is_fitted, validate_data

Rows = np.ndarray | Tensor  # a result, of the kind that was fitted
ALGORITHMS = ("auto", "ball_tree", "kd_tree", "brute")
DUPLICATES = -1e7  # scores below come from densities that only 1e-10 keeps finite


def _only(novelty: bool, method: str, instead: str) -> Callable[[Callable], Any]:
    """`available_if` for a method that exists with this `novelty` alone."""

    def check(estimator: LocalOutlierFactor) -> bool:
        if bool(estimator.novelty) is not novelty:
            raise AttributeError(
                f"{method} is not available when novelty={not novelty}: {instead}, or set "
                f"novelty={novelty}"
            )
        return True

    return available_if(check)


def _only_novelty(method: str) -> Callable[[Callable], Any]:
    return _only(True, method, "see fit_predict and negative_outlier_factor_ for the fitted rows")


class LocalOutlierFactor(OutlierMixin, BaseEstimator):
    """The textbook Local Outlier Factor (Breunig et al. 2000), as scikit-learn's class of the name.

    Rows come as an array or anything that scikit-learn makes one of, or as a dense tensor on any
    device, and results as what the rows were: numpy arrays, or tensors on that device, where all is
    computed. float32 is kept, float16 and bfloat16 tensors become float32, everything else float64.
    Results have the type that was fitted, in which neighbours are found; distances are measured in
    float64. No N x N matrix is ever held.

    Args:
        n_neighbors: k, at least 1; more than the other rows, and all of these are taken.
        algorithm: "auto", "ball_tree", "kd_tree" or "brute": all pairs are compared whichever it
            is, as it changes no result.
        leaf_size: at least 1; there are no trees whose leaves it could size.
        metric: "minkowski", which with `p=2` is "euclidean", "sqeuclidean" or "cosine". By cosine,
            a row of zeros is at distance 1 of every other row, but for rows of zeros.
        p: 2, the power of "minkowski"; the other metrics do not use it.
        metric_params: None, as no metric takes parameters.
        contamination: the share of outliers, in (0, 0.5], or "auto": those that score below -1.5.
        novelty: False to find outliers among the fitted rows (`fit_predict`), True to score new
            rows (`predict`, `decision_function`, `score_samples`).
        n_jobs: None or an int; the number of threads is torch's (`torch.set_num_threads`).

    Attributes (after `fit` on (N, D)):
        negative_outlier_factor_: (N,) the negative LOF; about -1 for inliers, lower for outliers.
        offset_: float; rows that score below it are outliers.
        n_neighbors_: the k used, at most N - 1.
        n_samples_fit_, n_features_in_: N and D. feature_names_in_: (D,) of rows with names.
        effective_metric_: the metric, "euclidean" for "minkowski". effective_metric_params_: {}.
    """

    def __init__(
        self,
        n_neighbors: int = 20,
        *,
        algorithm: str = "auto",
        leaf_size: int = 30,
        metric: str = "minkowski",
        p: float = 2,
        metric_params: None = None,
        contamination: float | str = "auto",
        novelty: bool = False,
        n_jobs: int | None = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.algorithm = algorithm
        self.leaf_size = leaf_size
        self.metric = metric
        self.p = p
        self.metric_params = metric_params
        self.contamination = contamination
        self.novelty = novelty
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: object = None) -> LocalOutlierFactor:
        """Score the rows X (N, D). Waits for the GPU.

        Raises:
            TypeError, ValueError: a parameter or X is none that the class allows, X is not finite,
                or N is 1.
        """
        self._check_parameters()
        self._fit_X = self._rows(X, fitting=True)
        self._fitted_tensor = isinstance(X, Tensor)
        self.n_samples_fit_ = len(self._fit_X)
        self.effective_metric_ = "euclidean" if self.metric == "minkowski" else self.metric
        self.effective_metric_params_: dict[str, object] = {}
        if self.n_neighbors > self.n_samples_fit_:
            warnings.warn(
                f"n_neighbors ({self.n_neighbors}) is more than the {self.n_samples_fit_} samples; "
                "n_neighbors will be set to (n_samples - 1)",
                stacklevel=2,
            )
        self.n_neighbors_ = max(1, min(self.n_neighbors, self.n_samples_fit_ - 1))
        distances, neighbors = self._nearest(None, self.n_neighbors_)
        self._k_distance = distances[:, -1].clone()
        self._density = self._local_density(distances, neighbors)
        scores = self._scores(self._density, neighbors)
        self.negative_outlier_factor_ = self._returned(scores)
        self.offset_ = -1.5
        if not isinstance(self.contamination, str):
            self.offset_ = float(np.percentile(scores.cpu().numpy(), 100 * self.contamination))
        if not self.novelty and scores.min() < DUPLICATES:
            warnings.warn(
                "Duplicate values are leading to incorrect results. Increase the number of "
                "neighbors for more accurate results.",
                stacklevel=2,
            )
        return self

    @_only(False, "fit_predict", "see fit and predict")
    def fit_predict(self, X: Any, y: object = None) -> Rows:
        """Labels (N,) of the rows X (N, D), int64: -1 for outliers, 1 for others."""
        return self.fit(X)._predict()

    @_only_novelty("predict")
    def predict(self, X: Any) -> Rows:
        """Labels (M,) of new rows X (M, D), int64: -1 for outliers, 1 for others."""
        return self._predict(X)

    @_only_novelty("decision_function")
    def decision_function(self, X: Any) -> Rows:
        """`score_samples` minus `offset_`, (M,): negative for outliers."""
        return self.score_samples(X) - self.offset_

    @_only_novelty("score_samples")
    def score_samples(self, X: Any) -> Rows:
        """Negative LOF (M,) of new rows X (M, D) among the fitted ones, each row for itself.

        A fitted row is its own neighbour here, so that it scores other than when it was fitted.
        """
        check_is_fitted(self)
        distances, neighbors = self._nearest(self._rows(X), self.n_neighbors_)
        return self._returned(self._scores(self._local_density(distances, neighbors), neighbors))

    def kneighbors(
        self, X: Any = None, n_neighbors: int | None = None, return_distance: bool = True
    ) -> tuple[Rows, Rows] | Rows:
        """The fitted rows nearest to the rows X (M, D), or without X to each fitted row but itself.

        Args:
            X: rows, of the kind and on the device that was fitted.
            n_neighbors: k; by default the parameter of that name.
            return_distance: False for the indices alone.

        Returns:
            Distances (M, k) by the metric, ascending, and indices (M, k), int64; equal distances by
            lower index.

        Raises:
            TypeError, ValueError: X is unlike the fitted rows, or there are fewer than k of them.
        """
        check_is_fitted(self)
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        k = _check.integer("n_neighbors", k, 1)
        found = self._nearest(None if X is None else self._rows(X), k)
        distances, neighbors = (self._returned(each) for each in found)
        return (distances, neighbors) if return_distance else neighbors

    def _check_parameters(self) -> None:
        _check.integer("n_neighbors", self.n_neighbors, 1)
        _check.integer("leaf_size", self.leaf_size, 1)
        if self.n_jobs is not None and not isinstance(self.n_jobs, Integral):
            raise TypeError(f"n_jobs must be None or an int, got {type(self.n_jobs).__name__}")
        for name, allowed in (("algorithm", ALGORITHMS), ("metric", ("minkowski", *METRICS))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.metric == "minkowski" and self.p != 2:
            raise ValueError(f'p must be 2 with metric="minkowski", got {self.p!r}')
        if self.metric_params is not None:
            raise ValueError(f"metric_params must be None, got {self.metric_params!r}")
        if isinstance(self.contamination, str):
            if self.contamination != "auto":
                raise ValueError(
                    f'contamination must be "auto" or in (0, 0.5], got {self.contamination!r}'
                )
        else:
            _check.contamination(self.contamination)
        if not isinstance(self.novelty, (bool, np.bool_)):
            raise TypeError(f"novelty must be a bool, got {type(self.novelty).__name__}")

    def _rows(self, X: Any, fitting: bool = False) -> Tensor:
        """X checked, as a tensor (M, D) of float32 or float64."""
        if isinstance(X, Tensor):
            rows = _checked(X)
            validate_data(self, rows, reset=fitting, skip_check_array=True)
        else:
            # A copy: torch warns of memory that is not writable.
            rows = torch.tensor(
                validate_data(self, X, reset=fitting, dtype=(np.float64, np.float32), order="C")
            )
        if fitting:
            return rows
        if isinstance(X, Tensor) is not self._fitted_tensor or rows.device != self._fit_X.device:
            fitted = f"a tensor on {self._fit_X.device}" if self._fitted_tensor else "an array"
            found = f"a tensor on {rows.device}" if isinstance(X, Tensor) else "an array"
            raise ValueError(f"X must be like the fitted rows, {fitted}, got {found}")
        return rows

    def _nearest(self, queries: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Distances by the metric and indices (M, k) of fitted rows; see `kneighbors`."""
        among_itself = queries is None
        fitted, asked = self.n_samples_fit_, len(self._fit_X if queries is None else queries)
        if k + among_itself > fitted:
            raise ValueError(
                f"Expected n_neighbors {'<' if among_itself else '<='} n_samples_fit, but "
                f"n_neighbors = {k}, n_samples_fit = {fitted}, n_samples = {asked}"
            )
        return nearest(self._fit_X, k, self.effective_metric_, queries)

    def _local_density(self, distances: Tensor, neighbors: Tensor) -> Tensor:
        k_distance = self._k_distance[None]
        return reference.reachability_density(distances[None], neighbors[None], k_distance)[0]

    def _scores(self, density: Tensor, neighbors: Tensor) -> Tensor:
        return -reference.density_ratio(self._density[None], neighbors[None], density[None])[0]

    def _predict(self, X: Any = None) -> Rows:
        """Labels of new rows, or of the fitted ones."""
        check_is_fitted(self)
        if X is None:
            outlier = self.negative_outlier_factor_ < self.offset_
        else:
            outlier = self.decision_function(X) < 0
        return 1 - 2 * (outlier.long() if isinstance(outlier, Tensor) else outlier.astype(np.int64))

    def _returned(self, result: Tensor) -> Rows:
        return result if self._fitted_tensor else result.numpy()


def _checked(X: Tensor) -> Tensor:
    """A dense real tensor (M, D) with finite rows, of floats of at least 32 bits."""
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
