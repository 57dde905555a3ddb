"""Nearest rows by a metric of the estimator, with distances measured in float64."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..backend import resolve
from ..chunked.candidates import band
from ..chunked.distances import in_order, pair_distances, settle
from ..ops import knn

METRICS = ("euclidean", "sqeuclidean", "cosine")


def nearest(x: Tensor, k: int, metric: str, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances and indices (M, k) of the rows of x (N, D) nearest to queries (M, D), ascending.

    Without queries, each row of x is compared with the others. All numbers are finite, float32 or
    float64. The result has the dtype of x. Equal distances come by lower index.

    Args:
        k: at most N, or N - 1 without queries.
        metric: one of `METRICS`.
    """
    dtype = x.dtype
    in_float32 = dtype == torch.float32 and (queries is None or queries.dtype == dtype)
    if metric == "cosine" and in_float32:
        distances, indices = knn(x, k, queries, metric)  # measures in float64 itself
    elif in_float32 and resolve(None, x) == "triton":  # which takes no float64
        distances, indices = _measured_again(x, k, queries)
    else:
        x, queries = x.double(), None if queries is None else queries.double()
        distances, indices = knn(x, k, queries, "cosine" if metric == "cosine" else "euclidean")
    if metric == "euclidean":
        distances = distances.sqrt()
    # Distances that differ may tie after the root or in the dtype of x: they are ordered once more.
    return in_order(distances.to(dtype), indices)


def _measured_again(x: Tensor, k: int, queries: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared distances in float64 and indices of the nearest among a few more than k by `knn`."""
    n_candidates = min(k + band(k), len(x) - (queries is None))
    _, candidates = knn(x, n_candidates, queries)
    exact = x.double()[None]
    rows = exact if queries is None else queries.double()[None]
    distances, indices = settle(candidates[None], k, partial(pair_distances, exact, queries=rows))
    return distances[0], indices[0]
