"""Nearest neighbours on the torch path, tile by tile within `chunked.WORKSPACE_BYTES`.

Where N does not fit one tile, the running O(B N k) neighbour lists come on top.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import chunked, progress
from .chunked import compute_dtype, plan, spans
from .selection import GROUP, smallest, smallest_grouped


class Search:
    """The k nearest tokens of rows (B, M, D), the tokens coming a few at a time.

    d2(i, j) - ||x_i||^2 = ||x_j||^2 - 2 x_i x_j ranks like d2 along a row. Both are centred first:
    distances do not change, and the products lose no digits to a few huge channels.

    Args:
        mean: (B, 1, D), which they are centred on.
        step: so many rows a product.
        first_row: the index of the first row where rows are tokens too, none its own neighbour.

    Attributes:
        indices: (B, M, k) of the nearest so far, nearest first.
    """

    def __init__(self, rows: Tensor, k: int, mean: Tensor, step: int, first_row: int | None):
        self._rows, self._mean, self._step, self._first_row = rows, mean, step, first_row
        shape = (*rows.shape[:2], k)
        self._scores = mean.new_full(shape, torch.inf)
        self.indices = torch.zeros(shape, dtype=torch.int64, device=rows.device)

    def see(self, tokens: Tensor, first: int) -> None:
        """Tokens (B, n, D) that count from `first`."""
        candidates, norms = _centred(tokens, self._mean, multiple=GROUP)
        # One tile for all: an allocator hands out and takes back so large ones at a cost.
        score = norms.new_empty(len(tokens), self._step, norms.shape[-1])
        for part in spans(self._rows.shape[1], self._step):
            centred, _ = _centred(self._rows[:, part], self._mean)
            tile = score[:, : centred.shape[1]]
            torch.baddbmm(norms.unsqueeze(1), centred, candidates.mT, alpha=-2, out=tile)
            if self._first_row is not None:
                offset = self._first_row + part.start - first
                tile.diagonal(offset=offset, dim1=-2, dim2=-1).fill_(torch.inf)
            _keep_smallest(self._scores[:, part], self.indices[:, part], tile, first)


def neighbors(x: Tensor, k: int, queries: Tensor | None = None) -> Tensor:
    """Indices (B, M, k) of the tokens of x (B, N, D) nearest to queries (B, M, D), nearest first.

    Without queries, of the nearest others to every token of x.
    """
    batch, tokens, width = x.shape
    tile = tile_of(batch, tokens, width, k, compute_dtype(x))
    rows, first_row = (x, 0) if queries is None else (queries, None)
    indices = x.new_empty((*rows.shape[:2], k), dtype=torch.int64)
    for images in spans(batch, tile.images):
        block = x[images]
        step = mean_step(len(block), width, compute_dtype(x))
        mean = finite_mean(block[:, part] for part in spans(tokens, step))
        search = Search(rows[images], k, mean, tile.rows, first_row)
        for columns in progress.steps(spans(tokens, tile.columns)):
            search.see(block[:, columns], columns.start)
        indices[images] = search.indices
    return indices


def tile_of(batch: int, tokens: int, width: int, k: int, dtype: torch.dtype) -> chunked.Tile:
    """The tile of a search for k neighbours: of its columns, k groups are read once more."""
    return plan(batch, tokens, width, dtype, copies=1 + 6 * min(1, k * GROUP / tokens))


def mean_step(batch: int, width: int, dtype: torch.dtype) -> int:
    """How many tokens `finite_mean` takes at a time."""
    return max(1, chunked.WORKSPACE_BYTES // max(1, 4 * batch * width * dtype.itemsize))


def finite_mean(parts: Iterable[Tensor]) -> Tensor:
    """(B, 1, D) mean of the finite tokens of the parts (B, n, D)."""
    # On the CPU, whatever the default device: numbers without dims fit tensors of any.
    total = count = torch.zeros((), dtype=torch.int64, device="cpu")
    for part in parts:
        finite = part.isfinite().all(dim=-1, keepdim=True)
        kept = torch.where(finite, part, 0)
        total = total + kept.sum(dim=1, keepdim=True, dtype=compute_dtype(part))
        count = count + finite.sum(dim=1, keepdim=True)
    return total / count.clamp(min=1)


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
