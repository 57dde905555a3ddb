"""The nearest candidates of every token, from tiles of the distances of all pairs, on a CPU.

Distances are symmetric, so that each tile above the diagonal serves its rows and its columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import tiles
from .gram import gram, tile_pairs
from .tiles import Scratch, compute_dtype, spans
from .topk import smallest

COLUMNS = 512  # columns of a tile that are copied to be rows at a time


class Lists(NamedTuple):
    """The candidates of the rows of all images, the nearest first."""

    squares: Tensor  # (R, n), the estimates c of `certificate.py`
    indices: Tensor  # (R, n), among the tokens of all images
    norms: Tensor  # (R,), of the centred rows


def candidate_lists(tokens: Tensor, middle: Tensor, n: int, scratch: Scratch) -> Lists | None:
    """The n others with the smallest squared distances for each of the tokens (b, N, D), n < N.

    Args:
        middle: (b, 1, D), as for `Candidates`; its dtype is that of the products.

    Returns:
        The lists of (b N) rows, with indices among the tokens of an image. None if the norm of a
        centred token is not finite, or its square is more than a 16th of the largest number.
    """
    batch, total, _ = tokens.shape
    largest = torch.finfo(compute_dtype(tokens)).max ** 0.5 / 4
    norms = middle.new_empty(batch, total)
    pairs = tile_pairs(total, middle.dtype)
    best: dict[int, tuple[Tensor, Tensor]] = {}
    for rows, columns in tiles.each_tile.get()(pairs):
        on_diagonal = rows == columns
        name = "rows" if on_diagonal else "columns"
        y = _minus(tokens[:, columns], middle, scratch, name)
        norms[:, columns] = norm = torch.linalg.vector_norm(y, dim=-1)
        if not norm.amax() < largest:
            return None
        squares = norm.square()
        if on_diagonal:  # the first tile of these rows
            y_rows, row_squares = y, squares
        shape = batch, y_rows.shape[1], y.shape[1]
        tile = scratch.take("tile", shape, compute_dtype(tokens))
        gram(y_rows, y, tile, scratch, (row_squares, squares))
        if on_diagonal:
            tile.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        else:
            _merge(best, columns.start, _smallest_of_columns(tile, n, scratch), rows.start, n)
        _merge(best, rows.start, smallest(tile, min(n, shape[2])), columns.start, n)
    values, indices = _joined_lists([best[start] for start in sorted(best)])
    return Lists(values.flatten(0, 1), indices.flatten(0, 1), norms.flatten())


def _minus(tokens: Tensor, middle: Tensor, scratch: Scratch, name: str) -> Tensor:
    """tokens - middle in the dtype of the middle."""
    out = scratch.take(name, tuple(tokens.shape), middle.dtype)
    if tokens.dtype == middle.dtype:
        return torch.sub(tokens, middle, out=out)
    return out.copy_(tokens).sub_(middle)  # a subtraction of two dtypes has another tensor


def _smallest_of_columns(tile: Tensor, n: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """`smallest` of the columns of a tile (b, r, c), (b, c, up to n)."""
    lists = []
    for part in spans(tile.shape[2], COLUMNS):
        turned = tile[..., part].mT
        turned = scratch.take("turned", tuple(turned.shape), tile.dtype).copy_(turned)
        lists.append(smallest(turned, min(n, tile.shape[1])))
    return _joined_lists(lists)


def _joined_lists(lists: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The squared distances and indices of consecutive rows (b, r, n) as two tensors."""
    if len(lists) == 1:
        return lists[0]
    values, indices = zip(*lists, strict=True)
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)


def _merge(
    best: dict[int, tuple[Tensor, Tensor]],
    start: int,
    found: tuple[Tensor, Tensor],
    first: int,
    n: int,
) -> None:
    """Merges what was found in columns that count from `first` into the n best of some rows.

    Args:
        best: squared distances and indices (b, r, up to n) of the rows from each `start` on.
        found: such lists. Their columns are all before or all after those of the best.
    """
    values, indices = found
    if first:
        indices += first
    if start in best:
        values = torch.cat([best[start][0], values], dim=-1)
        indices = torch.cat([best[start][1], indices], dim=-1)
        values, order = smallest(values, min(n, values.shape[-1]))
        indices = indices.gather(-1, order)
    best[start] = values, indices
