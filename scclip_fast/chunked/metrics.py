"""Nearest neighbours by each metric, on the search of `search.py`.

By cosine, 1 - cos(q, x) = ||q / ||q|| - x / ||x|| ||^2 / 2. Unit tokens are compared in float64,
whose differences lose no digits where two tokens have nearly the same direction. A token of zeros
has no direction, and is at the distance 1 from every token. As a column of the search it is the
unit vector of a channel of its own; the neighbours of such a row are listed without a search.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import reference
from . import search, tiles
from .distances import finite_tokens, in_order, pair_distances, settle
from .products import ProductCandidates
from .tiles import compute_dtype, longest_dtype, spans


def nearest(
    x: Tensor,
    k: int,
    queries: Tensor | None = None,
    metric: str = "euclidean",
    measure_all: bool = True,
) -> tuple[Tensor, Tensor]:
    """The k tokens of x (B, N, D) nearest to each query (B, M, D), as `reference.knn` has them.

    Args:
        k, queries: as for `search.nearest`.
        metric: "euclidean", "cosine" or "inner_product".
        measure_all: as for `search.nearest`; True for other metrics than "euclidean".
    """
    if metric == "euclidean":
        return search.nearest(x, k, queries, measure_all=measure_all)
    if metric == "cosine":
        return _nearest_by_cosine(x, k, queries)
    negative, indices = search.nearest(x, k, queries, kind=ProductCandidates)
    negative, indices = in_order(negative.to(compute_dtype(x)), indices)
    return -negative, indices


def _nearest_by_cosine(x: Tensor, k: int, queries: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distances and indices (B, M, k). The products of the first pass have the distances' dtype."""
    dtype = compute_dtype(x)
    distances, indices = _empty(x, k, queries)
    for images, units in _unit_images(x):
        if queries is None:
            squared, indices[images] = search.nearest(units, k, dtype=dtype)
            distances[images] = squared / 2
            continue
        for rows in spans(queries.shape[1], _tokens_per_step(x) // len(units) + 1):
            # A query of zeros is NaN here: no pass searches the rows that are not finite.
            asked = unit_tokens(queries[images, rows], zero=torch.nan)
            squared, indices[images, rows] = search.nearest(units, k, asked, dtype=dtype)
            distances[images, rows] = squared / 2
    return _list_neighbors_of_zeros(x, queries, *in_order(distances, indices))


def settle_by_cosine(
    x: Tensor, candidates: Tensor, k: int, queries: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Distances and indices (B, M, k) of the nearest of the candidates (B, M, m) of each query.

    Without queries, those of each token.
    """
    rows = x if queries is None else queries
    distances, indices = _empty(x, k, queries)
    for images, units in _unit_images(x):
        for some in spans(rows.shape[1], _tokens_per_step(x) // len(units) + 1):
            measure = partial(pair_distances, units, queries=unit_tokens(rows[images, some]))
            squared, indices[images, some] = settle(candidates[images, some], k, measure)
            distances[images, some] = squared / 2
    return _list_neighbors_of_zeros(x, queries, *in_order(distances, indices))


def unit_tokens(x: Tensor, zero: float = 1, dtype: torch.dtype | None = None) -> Tensor:
    """The unit vectors of tokens (B, n, D) with one more channel, (B, n, D + 1).

    Args:
        zero: the number in that channel for a token of zeros, the only number that it has.
        dtype: dtype of the result, by default float64. It is rounded from float64.
    """
    batch, n, width = x.shape
    longest = longest_dtype(x.device)
    units = x.new_zeros(batch, n, width + 1, dtype=dtype or longest)
    for some in spans(n, _tokens_per_step(x) // max(1, batch) + 1):
        units[:, some, :width] = reference.divided_by_norm(x[:, some].to(longest))
        units[:, some, width].masked_fill_((x[:, some] == 0).all(dim=-1), zero)
    return units


def _unit_images(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields unit tokens image by image, or of as many images as fit a part of the workspace."""
    for images in spans(len(x), max(1, _tokens_per_step(x) // x.shape[1])):
        yield images, unit_tokens(x[images])


def _tokens_per_step(x: Tensor) -> int:
    """The number of tokens of the width of x whose float64 fits an eighth of the workspace."""
    return tiles.WORKSPACE_BYTES // 8 // (8 * (x.shape[-1] + 1))


def _empty(x: Tensor, k: int, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = (*(x if queries is None else queries).shape[:2], k)
    indices = torch.empty(shape, dtype=torch.int64, device=x.device)
    return torch.empty(shape, dtype=compute_dtype(x), device=x.device), indices


def _list_neighbors_of_zeros(
    x: Tensor, queries: Tensor | None, distances: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Overwrites the neighbours of rows of zeros: the first k tokens, at the distance 1.

    Finite tokens come first. Without queries, a token is left out of its own list.
    """
    rows, k = (x if queries is None else queries), indices.shape[-1]
    finite = finite_tokens(x)
    order = (~finite).to(torch.uint8).sort(dim=-1, stable=True).indices[:, : k + 1]
    step = max(1, tiles.WORKSPACE_BYTES // 16 // (24 * k * max(1, len(x))))
    for some in spans(rows.shape[1], step):
        first = order[:, None, :].expand(-1, some.stop - some.start, -1)
        listed = first[..., :k]
        if queries is None:
            itself = torch.arange(some.start, some.stop, device=x.device)[:, None]
            passed = (listed == itself).cumsum(dim=-1) > 0
            listed = torch.where(passed, first[..., 1:], listed)
        zero = (rows[:, some] == 0).all(dim=-1, keepdim=True)
        usable = finite.gather(-1, listed.flatten(1)).view_as(listed)
        value = torch.where(usable, 1, torch.nan).to(distances.dtype)
        distances[:, some] = torch.where(zero, value, distances[:, some])
        indices[:, some] = torch.where(zero, listed, indices[:, some])
    return distances, indices
