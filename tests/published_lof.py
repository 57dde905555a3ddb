"""SC-CLIP's Local Outlier Factor as published, step by step, for one image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def explicit_distances(x: Tensor) -> Tensor:
    """Computes squared distances (N, N) from all differences (N, N, D), as published."""
    return torch.norm(x[:, None] - x[None, :], dim=2, p=2) ** 2


def product_distances(x: Tensor) -> Tensor:
    """Computes squared distances (N, N) by a matrix product, where the differences do not fit.

    ||x_i - x_j||^2 = ||x_i||^2 + ||x_j||^2 - 2 x_i x_j. The diagonal is -inf, so that rounding
    moves no token from the first place among its neighbours.
    """
    norms = x.square().sum(dim=1)
    return torch.addmm(norms, x, x.T, alpha=-2).add_(norms[:, None]).fill_diagonal_(-torch.inf)


def lof(
    x: Tensor,
    n_neighbors: int = 30,
    contamination: float = 0.05,
    squared_distances: Callable[[Tensor], Tensor] = explicit_distances,
) -> tuple[Tensor, Tensor]:
    """Computes the indices of the outliers (M,) and all scores (N,) of tokens (N, D)."""
    nearest, neighbors = torch.topk(squared_distances(x), n_neighbors + 1, largest=False)
    nearest, neighbors = nearest[:, 1:], neighbors[:, 1:]  # the first is the token itself
    reachability = torch.max(nearest, nearest[:, -1:].expand_as(nearest))
    density = n_neighbors / torch.nan_to_num(reachability.mean(dim=1), nan=1e-6)
    scores = (density[neighbors] / density.unsqueeze(1)).mean(dim=1)
    threshold = torch.quantile(scores.to(torch.float32), 1 - contamination)
    return torch.where(scores > threshold)[0], scores


def lof_mask(
    x: Tensor,
    n_neighbors: int,
    contamination: float,
    squared_distances: Callable[[Tensor], Tensor] = explicit_distances,
) -> Tensor:
    """Computes the mask (N,) of the outliers."""
    indices, _ = lof(x, n_neighbors, contamination, squared_distances)
    return torch.zeros(len(x), dtype=torch.bool, device=x.device).index_fill_(0, indices, True)
