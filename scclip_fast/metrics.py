"""Nearest rows by a metric, of one set among itself or of queries in it, measured in float64."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .ops import knn
from .ops.outliers import BAND, settle
from .precision import true_float32
from .search import neighbors, pair_distances

METRICS = ("euclidean", "sqeuclidean", "cosine")


@true_float32
def nearest(x: Tensor, k: int, metric: str, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances and indices (M, k) of the rows of x (N, D) nearest to queries (M, D), ascending.

    Without queries, of the nearest others to every row of x, by `knn`; k is at most N - 1 then, and
    N with queries. Equal distances by lower index. All finite, float32 or float64; the search and
    the result have the type of x. The search finds a few more than k, and float64 decides between
    those whose distances nearly tie.
    """
    exact = [part.double() for part in (x, queries) if part is not None]
    if metric == "cosine":
        exact = _unit(*exact)
    parts = [part.to(x.dtype)[None] for part in exact]
    if queries is None:
        _, candidates = knn(parts[0], min(k + BAND, len(x) - 1))
    else:
        candidates = neighbors(parts[0], min(k + BAND, len(x)), parts[1])
    measure = partial(pair_distances, exact[0][None], queries=exact[-1][None])
    squared, indices = settle(candidates, k, measure)
    return _of_squared(squared[0], metric).to(x.dtype), indices[0]


def _of_squared(squared: Tensor, metric: str) -> Tensor:
    if metric == "euclidean":
        return squared.sqrt()
    return squared / 2 if metric == "cosine" else squared


def _unit(*parts: Tensor) -> list[Tensor]:
    """Unit rows: half their squared distance is 1 - cos, and loses no digits where cos is near 1.

    Rows of zeros, if any, get a channel to themselves, which makes that half 1.
    """
    norms = [torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in parts]
    zero = [norm == 0 for norm in norms]
    units = [part / norm.where(norm > 0, 1) for part, norm in zip(parts, norms, strict=True)]
    if any(mask.any() for mask in zero):
        units = [torch.cat([*pair], dim=-1) for pair in zip(units, zero, strict=True)]
    return units
