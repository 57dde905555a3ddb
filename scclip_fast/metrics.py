"""Nearest rows by a metric, of one set among itself or of queries in it, measured in float64."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import search
from .backend import resolve
from .ops import knn
from .precision import true_float32

METRICS = ("euclidean", "sqeuclidean", "cosine")


@true_float32
def nearest(x: Tensor, k: int, metric: str, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances and indices (M, k) of the rows of x (N, D) nearest to queries (M, D), ascending.

    Without queries, each row of x is compared with the others; k is at most N - 1 then, and N with
    queries. Equal distances come by lower index. All numbers are finite, float32 or float64; the
    products and the result have the type of x, and the distances that decide are measured in
    float64.
    """
    given = [part[None] for part in (x, queries) if part is not None]
    exact = [part.double() for part in given]
    if metric == "cosine":
        exact = _unit(*exact)
    # Unit rows rounded to float32 would no longer be the rows that are measured.
    parts = exact if metric == "cosine" else given
    if queries is None and resolve(None, parts[0]) == "triton":
        _, candidates = knn(parts[0], min(k + search.band(k), len(x) - 1))
        measure = partial(search.pair_distances, exact[0], queries=exact[0])
        squared, indices = search.settle(candidates, k, measure)
    else:
        asking = None if queries is None else parts[1]
        squared, indices = search.nearest(parts[0], k, asking, exact=(exact[0], exact[-1]))
    # Distances can tie that did not before the root: by lower index once more.
    indices, order = indices[0].sort(dim=-1)
    distances = _of_squared(squared[0].gather(-1, order), metric).to(x.dtype)
    distances, order = distances.sort(dim=-1, stable=True)
    return distances, indices.gather(-1, order)


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
