"""The Local Outlier Factor with scikit-learn's API, on numpy arrays and on tensors of any device.

Needs the extra `sklearn` (scikit-learn 1.6 or newer).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..extras import needs
from ..ops import _check
from .metrics import METRICS, nearest

with needs("sklearn"):
    import numpy as np
    from sklearn.base import BaseEstimator, OutlierMixin
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.validation import check_is_fitted, validate_data

    from .checks import check_parameters, check_tensor

__all__ = ["METRICS", "LocalOutlierFactor"]

Rows = np.ndarray | Tensor  # a result, of the kind that was fitted
DUPLICATES = -1e7  # lower scores come from densities that only the added 1e-10 keeps finite


def _only(novelty: bool, method: str, instead: str) -> Callable[[Callable], Any]:
    """A decorator of a method that exists only with this value of `novelty`.

    Elsewhere, the method raises AttributeError, whose message advises `instead`.
    """

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

    Rows are an array, anything that scikit-learn makes one of, or a dense tensor on any device.
    Results are of the same kind: numpy arrays, or tensors on that device, which computes them.
    float32 is kept, float16 and bfloat16 tensors become float32, everything else float64. Results
    have the dtype that was fitted; distances are measured in float64. `knn` finds the neighbours of
    fitted and of new rows, on the device of the tensors. No N x N matrix is ever held.

    Args:
        n_neighbors: k, at least 1. If there are fewer other rows, all of them are neighbours.
        algorithm: "auto", "ball_tree", "kd_tree" or "brute". It changes no result, as all pairs are
            compared in any case.
        leaf_size: at least 1, without effect, as there are no trees.
        metric: "minkowski", which with `p=2` is "euclidean", "sqeuclidean" or "cosine". By cosine,
            the distance of a row of zeros to every row is 1.
        p: 2, the power of "minkowski". The other metrics do not use it.
        metric_params: None, as no metric takes parameters.
        contamination: the share of outliers, in (0, 0.5], or "auto", which takes rows that score
            below -1.5 for outliers.
        novelty: False to find outliers among the fitted rows (`fit_predict`), True to score new
            rows (`predict`, `decision_function`, `score_samples`).
        n_jobs: None or an int, without effect: `torch.set_num_threads` sets the number of threads.

    Attributes (after `fit` on (N, D)):
        negative_outlier_factor_: (N,), the negative LOF, about -1 for inliers, lower for outliers.
        offset_: float; rows that score below it are outliers.
        n_neighbors_: the k used, at most N - 1.
        n_samples_fit_, n_features_in_: N and D. feature_names_in_: (D,), if the rows have names.
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
        """Scores the rows X (N, D). Waits for the GPU.

        Raises:
            TypeError, ValueError: a parameter or X that the class does not take, an X that is not
                finite, or N = 1.
        """
        check_parameters(self)
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
        """Negative LOF (M,) of new rows X (M, D) among the fitted rows, each row by itself.

        A fitted row is its own neighbour here, so its score differs from the one of `fit`.
        """
        check_is_fitted(self)
        distances, neighbors = self._nearest(self._rows(X), self.n_neighbors_)
        return self._returned(self._scores(self._local_density(distances, neighbors), neighbors))

    def kneighbors(
        self, X: Any = None, n_neighbors: int | None = None, return_distance: bool = True
    ) -> tuple[Rows, Rows] | Rows:
        """The fitted rows nearest to the rows X (M, D), or the others nearest to each fitted row.

        Args:
            X: rows of the kind and on the device that was fitted; None for the fitted rows.
            n_neighbors: k; by default the parameter of that name.
            return_distance: False to return the indices alone.

        Returns:
            Distances (M, k) by the metric, ascending, and indices (M, k), int64. Equal distances
            come by lower index.

        Raises:
            TypeError, ValueError: X is unlike the fitted rows, or k exceeds their number.
        """
        check_is_fitted(self)
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        k = _check.integer("n_neighbors", k, 1)
        nearest_rows = self._nearest(None if X is None else self._rows(X), k)
        distances, neighbors = (self._returned(tensor) for tensor in nearest_rows)
        return (distances, neighbors) if return_distance else neighbors

    def _rows(self, X: Any, fitting: bool = False) -> Tensor:
        """The checked rows X as a tensor (M, D) of float32 or float64."""
        if isinstance(X, Tensor):
            rows = check_tensor(X)
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
            given = f"a tensor on {rows.device}" if isinstance(X, Tensor) else "an array"
            raise ValueError(f"X must be like the fitted rows, {fitted}, got {given}")
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
        """Labels of new rows X, or of the fitted rows if X is None."""
        check_is_fitted(self)
        if X is None:
            outlier = self.negative_outlier_factor_ < self.offset_
        else:
            outlier = self.decision_function(X) < 0
        return 1 - 2 * (outlier.long() if isinstance(outlier, Tensor) else outlier.astype(np.int64))

    def _returned(self, result: Tensor) -> Rows:
        return result if self._fitted_tensor else result.numpy()
