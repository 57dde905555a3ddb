"""Nearest rows by a metric of the estimator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunked.distances import in_order
from ..ops import knn

METRICS = ("euclidean", "sqeuclidean", "cosine")

#: float32 rows beyond these magnitudes are searched in float64, where no square over- or underflows.
SAFE_FLOAT32 = 1e-12, 1e15


def nearest(x: Tensor, k: int, metric: str, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances and indices (M, k) of the rows of x (N, D) nearest to queries (M, D), ascending.

    Without queries, each row of x is compared with the others. All numbers are finite. The result
    has the dtype of x, float32 or float64. Equal distances come by lower index.

    Args:
        k: at most N, or N - 1 without queries.
        metric: one of `METRICS`.
    """
    dtype = x.dtype
    if metric != "cosine" and not all(_is_safe(rows) for rows in (x, queries) if rows is not None):
        x, queries = x.double(), None if queries is None else queries.double()
    distances, indices = knn(x, k, queries, "cosine" if metric == "cosine" else "euclidean")
    if metric == "euclidean":
        distances = distances.sqrt()
    return in_order(distances.to(dtype), indices)


def _is_safe(rows: Tensor) -> bool:
    """True if squared distances of the rows are normal numbers of their dtype. Waits for a GPU."""
    if rows.dtype == torch.float64 or not rows.numel():
        return True
    least, most = SAFE_FLOAT32
    magnitude = rows.abs().amax()
    return bool((magnitude == 0) | ((magnitude > least) & (magnitude < most)))
