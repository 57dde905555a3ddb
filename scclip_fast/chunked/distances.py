"""Measured distances of candidates, and the order of near ties by them.

A measured distance is the sum of squared differences, whose rounding is that of the distance
itself. A product rounds by as much as the norms do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import tiles
from .tiles import compute_dtype, spans


def pair_distances(
    x: Tensor, neighbors: Tensor, queries: Tensor, finite: Tensor | None = None
) -> Tensor:
    """`squared_differences`, with the distance NaN for pairs with a token that is not finite.

    Args:
        x, neighbors, queries: as for `squared_differences`.
        finite: `finite_tokens(x)`, if the caller has it.
    """
    distances = squared_differences(x, neighbors, queries)
    finite = finite_tokens(x) if finite is None else finite
    usable = finite.gather(-1, neighbors.flatten(1)).view_as(neighbors)
    usable &= finite_tokens(queries).unsqueeze(-1)
    return distances.masked_fill_(~usable, torch.nan)


def squared_differences(x: Tensor, neighbors: Tensor, queries: Tensor) -> Tensor:
    """||q_i - x_j||^2 (B, M, m) for j in neighbors (B, M, m), exactly 0 for duplicates.

    Args:
        x: (B, N, D).
        neighbors: indices of tokens of x.
        queries: (B, M, D).
    """
    batch, asked, m = neighbors.shape
    dtype = compute_dtype(x)
    distances = torch.empty(batch, asked, m, dtype=dtype, device=x.device)
    row_bytes = max(1, m * x.shape[-1] * dtype.itemsize)
    rows_per_step = max(1, tiles.WORKSPACE_BYTES // 32 // row_bytes)
    for image in range(batch):
        for rows in spans(asked, rows_per_step):
            others = x[image].index_select(0, neighbors[image, rows].flatten()).to(dtype)
            difference = others.unflatten(0, (-1, m)).sub_(queries[image, rows, None])
            distances[image, rows] = difference.square_().sum(dim=-1)
    return distances


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
