"""Nearest rows by a metric, with distances measured in float64."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..backend import resolve
from ..chunked.candidates import band
from ..chunked.distances import pair_distances, settle
from ..chunked.search import nearest as search
from ..ops import knn
from ..precision import true_float32

METRICS = ("euclidean", "sqeuclidean", "cosine")


@true_float32
def nearest(x: Tensor, k: int, metric: str, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances and indices (M, k) of the rows of x (N, D) nearest to queries (M, D), ascending.

    Without queries, each row of x is compared with the others. All numbers are finite, float32 or
    float64. The products and the result have the dtype of x, and the distances that decide are
    measured in float64. Equal distances come by lower index.

    Args:
        k: at most N, or N - 1 without queries.
        metric: one of `METRICS`.
    """
    given = [rows[None] for rows in (x, queries) if rows is not None]
    exact = [rows.double() for rows in given]
    if metric == "cosine":
        exact = _unit(*exact)
    # Unit rows rounded to float32 would no longer be the rows that are measured.
    multiplied = exact if metric == "cosine" else given
    if queries is None and resolve(None, multiplied[0]) == "triton":
        _, candidates = knn(multiplied[0], min(k + band(k), len(x) - 1))
        measure = partial(pair_distances, exact[0], queries=exact[0])
        squared, indices = settle(candidates, k, measure)
    else:
        multiplied_queries = None if queries is None else multiplied[1]
        pair = exact[0], exact[-1]
        squared, indices = search(multiplied[0], k, multiplied_queries, exact=pair)
    # Distances that differ as squares may tie after the root, so they are ordered once more.
    indices, order = indices[0].sort(dim=-1)
    distances = _from_squared(squared[0].gather(-1, order), metric).to(x.dtype)
    distances, order = distances.sort(dim=-1, stable=True)
    return distances, indices.gather(-1, order)


def _from_squared(squared: Tensor, metric: str) -> Tensor:
    """The distances by a metric from squared Euclidean ones; for cosine, those of unit rows."""
    if metric == "euclidean":
        return squared.sqrt()
    return squared / 2 if metric == "cosine" else squared


def _unit(*sets: Tensor) -> list[Tensor]:
    """The rows of each set divided by their norms.

    Half the squared distance of unit rows is 1 - cos, and loses no digits where cos is near 1. If
    there are rows of zeros, they get a channel of their own, which makes that half 1.
    """
    norms = [torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in sets]
    zero = [norm == 0 for norm in norms]
    units = [rows / norm.where(norm > 0, 1) for rows, norm in zip(sets, norms, strict=True)]
    if any(mask.any() for mask in zero):
        units = [torch.cat([*pair], dim=-1) for pair in zip(units, zero, strict=True)]
    return units
