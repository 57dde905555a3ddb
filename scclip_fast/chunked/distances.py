"""Measured distances and products of candidates, and the order of near ties by them.

A measured distance is the sum of squared differences, whose rounding is that of the distance
itself. A distance from a matrix product rounds by as much as the norms do. A measured product is a
sum in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import tiles
from .tiles import compute_dtype, longest_dtype, spans

#: One part in so many of the workspace holds the pairs of one step on a CPU. 512 KiB stay in a
#: core's cache: 1568 pairs of 768 channels take 1.1 ms, and 2.5 ms in steps of 2 MiB (one core).
CACHED_SHARE = 128
CHANNELS = 256  # channels of one step of `distances_by_products`; fewer are slower


def pair_distances(
    x: Tensor, neighbors: Tensor, queries: Tensor, finite: Tensor | None = None
) -> Tensor:
    """`squared_differences`, with the distance NaN for pairs with a token that is not finite.

    Args:
        x, neighbors, queries: as for `squared_differences`.
        finite: `finite_tokens(x)`, if the caller has it.
    """
    return _finite_pairs(squared_differences(x, neighbors, queries), x, neighbors, queries, finite)


def pair_products(
    x: Tensor, neighbors: Tensor, queries: Tensor, finite: Tensor | None = None
) -> Tensor:
    """-q_i x_j (B, M, m) in float64, with NaN for pairs with a token that is not finite.

    The sign lets the nearest tokens have the smallest numbers, as by a distance.

    Args:
        x, neighbors, queries, finite: as for `pair_distances`.
    """
    products = _sums(x, neighbors, queries, longest_dtype(x.device), Tensor.mul_)
    return _finite_pairs(products.neg_(), x, neighbors, queries, finite)


def squared_differences(x: Tensor, neighbors: Tensor, queries: Tensor) -> Tensor:
    """||q_i - x_j||^2 (B, M, m) for j in neighbors (B, M, m), exactly 0 for duplicates.

    Args:
        x: (B, N, D).
        neighbors: indices of tokens of x.
        queries: (B, M, D).
    """
    return _sums(x, neighbors, queries, compute_dtype(x), lambda a, b: a.sub_(b).square_())


def distances_by_products(x: Tensor, middle: Tensor, neighbors: Tensor, rows: slice) -> Tensor:
    """||x_i - x_j||^2 (R, m) in float64, by products of each token with its neighbours alone.

    Rounding can make the distance of near duplicates less than 0.

    Args:
        x: (B, N, D) on a CPU.
        middle: (B, 1, D), a point near the tokens of an image, which is subtracted from them.
        neighbors: (R, m), indices among all B N tokens.
        rows: the R tokens i, among all.
    """
    asked, m = neighbors.shape
    total = x.shape[0] * x.shape[1]
    channels_per_step = min(CHANNELS, max(1, tiles.WORKSPACE_BYTES // 8 // (8 * total)))
    norms = torch.zeros(total, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        products = torch.sparse_csr_tensor(
            torch.arange(0, asked * m + 1, m),
            neighbors.flatten(),
            torch.zeros(asked * m, dtype=torch.float64),
            (asked, total),
            check_invariants=False,
        )
    for channels in spans(x.shape[-1], channels_per_step):
        y = (x[..., channels].double() - middle[..., channels].double()).flatten(0, 1)
        norms += torch.linalg.vector_norm(y, dim=-1).square_()
        torch.sparse.sampled_addmm(products, y[rows], y.mT, out=products)
    squares = norms[neighbors].add_(norms[rows].unsqueeze(1))
    return squares.sub_(products.values().view(asked, m), alpha=2)


def _sums(
    x: Tensor,
    neighbors: Tensor,
    queries: Tensor,
    dtype: torch.dtype,
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The sum over the channels of `combine` (B, M, m) for each pair of a query and a neighbour.

    Args:
        combine: takes neighbours (r, m, D) in `dtype`, which it may overwrite, and queries
            (r, 1, D).
    """
    batch, asked, m = neighbors.shape
    sums = torch.empty(batch, asked, m, dtype=dtype, device=x.device)
    row_bytes = max(1, m * x.shape[-1] * dtype.itemsize)
    share = CACHED_SHARE if x.device.type == "cpu" else 32
    rows_per_step = max(1, tiles.WORKSPACE_BYTES // share // row_bytes)
    for image in range(batch):
        for rows in spans(asked, rows_per_step):
            others = x[image].index_select(0, neighbors[image, rows].flatten()).to(dtype)
            pairs = combine(others.unflatten(0, (-1, m)), queries[image, rows, None])
            sums[image, rows] = pairs.sum(dim=-1)
    return sums


def _finite_pairs(
    values: Tensor, x: Tensor, neighbors: Tensor, queries: Tensor, finite: Tensor | None
) -> Tensor:
    """The values (B, M, m) with NaN for pairs with a token that is not finite."""
    finite = finite_tokens(x) if finite is None else finite
    usable = finite.gather(-1, neighbors.flatten(1)).view_as(neighbors)
    usable &= finite_tokens(queries).unsqueeze(-1)
    return values.masked_fill_(~usable, torch.nan)


def finite_tokens(x: Tensor) -> Tensor:
    """Mask (B, N) of the tokens of x (B, N, D) that hold neither NaN nor infinity."""
    # The two extremes take a tenth of the time of isfinite().all() on a CPU.
    return x.amax(dim=-1).isfinite() & x.amin(dim=-1).isfinite()


def settle(
    candidates: Tensor, places: int, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The nearest of the candidates (B, M, m): squared distances and indices (B, M, places).

    The distances are ascending. Of equal ones, the lower index comes first.

    Args:
        measure: takes candidates to their squared distances.
    """
    candidates = candidates.sort(dim=-1).values
    distances, order = measure(candidates).sort(dim=-1, stable=True)
    return distances[..., :places], candidates.gather(-1, order[..., :places])


def settle_last(
    candidates: Tensor, k: int, n_measured: int, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Indices (B, M, k) of the nearest, and the squared distances of the last ones among them.

    Only the last `n_measured` of the candidates (B, M, c), which ascend by their scores, are
    measured and compete for the last places. The candidates before them are neighbours already.
    """
    sure, near_ties = candidates.tensor_split([candidates.shape[-1] - n_measured], dim=-1)
    distances, chosen = settle(near_ties, k - sure.shape[-1], measure)
    return distances, torch.cat([sure, chosen], dim=-1)


def in_order(distances: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Distances and indices (..., k) by ascending distance, equal distances by lower index.

    Rounding to a shorter dtype, or a root, may make equal what was ordered before.
    """
    indices, by_index = indices.sort(dim=-1)
    distances, order = distances.gather(-1, by_index).sort(dim=-1, stable=True)
    return distances, indices.gather(-1, order)
