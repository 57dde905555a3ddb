"""Nearest neighbours on the torch path, tile by tile within `chunked.WORKSPACE_BYTES`.

Where N does not fit one tile, the running O(B N k) neighbour lists come on top.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunked
from .chunked import compute_dtype, plan, spans
from .selection import GROUP, smallest, smallest_grouped


def finite_mean(x: Tensor) -> Tensor:
    """(B, 1, D) mean of the finite tokens; what is centred on it loses no digits to an offset."""
    batch, tokens, width = x.shape
    dtype = compute_dtype(x)
    total = x.new_zeros(batch, 1, width, dtype=dtype)
    count = x.new_zeros(batch, 1, 1, dtype=dtype)
    for part in spans(
        tokens, max(1, chunked.WORKSPACE_BYTES // max(1, 4 * batch * width * dtype.itemsize))
    ):
        finite = x[:, part].isfinite().all(dim=-1, keepdim=True)
        total += torch.where(finite, x[:, part], 0).sum(dim=1, keepdim=True, dtype=dtype)
        count += finite.sum(dim=1, keepdim=True)
    return total / count.clamp(min=1)


def neighbors(x: Tensor, k: int, queries: Tensor | None = None) -> Tensor:
    """Indices (B, M, k) of the tokens of x (B, N, D) nearest to queries (B, M, D), nearest first.

    Without queries, of the nearest others to every token of x.

    d2(i, j) - ||x_i||^2 = ||x_j||^2 - 2 x_i x_j ranks like d2 along a row. x is centred first:
    distances do not change, and the products lose no digits to a few huge channels.
    """
    batch, tokens, width = x.shape
    dtype = compute_dtype(x)
    tile = plan(batch, tokens, width, dtype, copies=1 + 6 * min(1, k * GROUP / tokens))
    from_rows = x if queries is None else queries
    asked = from_rows.shape[1]
    scores = x.new_full((batch, asked, k), torch.inf, dtype=dtype)
    indices = x.new_zeros((batch, asked, k), dtype=torch.int64)
    for images in spans(batch, tile.images):
        block, mean = x[images], finite_mean(x[images])
        for columns in spans(tokens, tile.columns):
            candidates, norms = _centred(block[:, columns], mean, multiple=GROUP)
            # One tile for all: an allocator hands out and takes back so large ones at a cost.
            score = norms.new_empty(block.shape[0], tile.rows, norms.shape[-1])
            for rows in spans(asked, tile.rows):
                centred, _ = _centred(from_rows[images, rows], mean)
                part = score[:, : centred.shape[1]]
                torch.baddbmm(norms.unsqueeze(1), centred, candidates.mT, alpha=-2, out=part)
                if queries is None:
                    itself = part.diagonal(offset=rows.start - columns.start, dim1=-2, dim2=-1)
                    itself.fill_(torch.inf)
                _keep_smallest(scores[images, rows], indices[images, rows], part, columns.start)
            del candidates, score  # before the next are made
    return indices


def pair_distances(x: Tensor, neighbors: Tensor, queries: Tensor | None = None) -> Tensor:
    """||q_i - x_j||^2 (B, M, m) for j in neighbors (B, M, m), exactly 0 for duplicates.

    Without queries q (B, M, D), these are the tokens of x (B, N, D). It sums squared differences:
    the Gram form only ranks, as its error is that of the norms.
    """
    batch, asked, m = neighbors.shape
    from_rows = x if queries is None else queries
    dtype = compute_dtype(x)
    distances = torch.empty(batch, asked, m, dtype=dtype, device=x.device)
    rows_per_step = max(
        1, chunked.WORKSPACE_BYTES // 32 // max(1, m * x.shape[-1] * dtype.itemsize)
    )
    for image in range(batch):
        for rows in spans(asked, rows_per_step):
            others = x[image].index_select(0, neighbors[image, rows].flatten()).to(dtype)
            difference = others.unflatten(0, (-1, m)).sub_(from_rows[image, rows, None])
            distances[image, rows] = difference.square_().sum(dim=-1)
    return torch.where(distances.isfinite(), distances, torch.inf)


def _centred(tokens: Tensor, mean: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """tokens (b, n, D) - mean and its squared norms (b, n), with n filled up to a multiple.

    A token that is not finite becomes 0 with the largest finite norm, one that only fills up 0 with
    an infinite norm: in this order they come last.
    """
    batch, n, width = tokens.shape
    missing = -n % multiple
    centred = mean.new_empty(batch, n + missing, width)
    centred[:, n:] = 0
    torch.sub(tokens, mean, out=centred[:, :n])
    norms = torch.linalg.vector_norm(centred, dim=-1).square_()
    broken = ~norms.isfinite()
    norms.masked_fill_(broken, torch.finfo(norms.dtype).max)[:, n:] = torch.inf
    return centred.masked_fill_(broken.unsqueeze(-1), 0), norms


def _keep_smallest(best_scores: Tensor, best_indices: Tensor, scores: Tensor, first: int) -> None:
    """Merge scores (b, r, c), whose columns count from `first`, into the best so far (b, r, k)."""
    k = best_scores.shape[-1]
    found, position = smallest_grouped(scores, k)
    position += first
    if first > 0 or found.shape[-1] < k:
        found, order = smallest(torch.cat([best_scores, found], dim=-1), k)
        position = torch.cat([best_indices, position], dim=-1).gather(-1, order)
    best_scores.copy_(found)
    best_indices.copy_(position)
