"""The search among the tokens themselves on a CPU, with each product of two tokens made once.

Measuring a distance reads the features of two tokens, which takes longer than their product. So the
first look measures as little as it can, and only rows that it leaves open have their candidates
measured as in `search.py`:

- For a k-distance, the k-th candidate alone is measured.
- For all distances among at most `FLOAT64_TOKENS` tokens, nothing is measured: the products are
  float64's. Rows with neighbours that are nearly equal to the token, or equally far, stay open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import tiles
from .candidates import centre, centred, list_sizes
from .certificate import Found, error_bound, undecided
from .distances import pair_distances, settle_last, squared_differences
from .gram import gram, images_per_step, tile_pairs
from .tiles import compute_dtype, spans

#: Channels of one product. More channels are summed over products, so that rounding grows with
#: DEPTH + D / DEPTH instead of D: a sixth of the rows of Gaussian tokens stays open, not one half.
DEPTH = 128
FLOAT64_TOKENS = 3072  # above, measuring the candidates takes less time than products in float64


Measure = Callable[[Tensor], Tensor]  # of candidates (1, R, m) to their squared distances


class Lists(NamedTuple):
    """The candidates of each row, as `Candidates` has them, but equal scores in any order."""

    scores: Tensor  # (R, n)
    indices: Tensor  # (R, n)
    norms: Tensor  # (R,)


def has_room(x: Tensor, k: int) -> bool:
    """True on a CPU if the candidates of all rows of an image fit the workspace."""
    row_bytes = 12 * sum(list_sizes(k, x.shape[1] - 1, True)[:1])
    return x.device.type == "cpu" and 0 < len(x) and x.shape[1] * row_bytes <= tiles.WORKSPACE_BYTES


def search_symmetric(x: Tensor, k: int, measure_all: bool) -> Found:
    """The first pass of `search.nearest`, by products, for every token of x (B, N, D).

    Args:
        measure_all: as for `nearest`.
    """
    batch, tokens, width = x.shape
    steps = spans(batch, images_per_step(tokens, width))
    parts = [_search_images(x[images], k, measure_all) for images in steps]
    return parts[0] if len(parts) == 1 else Found(*map(torch.cat, zip(*parts, strict=True)))


def _search_images(x: Tensor, k: int, measure_all: bool) -> Found:
    """`search_symmetric` of a few images."""
    batch, tokens, _ = x.shape
    n, n_measured = list_sizes(k, tokens - 1, measure_all)
    in_float32 = compute_dtype(x) == torch.float32
    by_products = measure_all and in_float32 and tokens <= FLOAT64_TOKENS
    width = _sum_length(x.shape[-1])
    middle = centre(x, torch.float64 if by_products else compute_dtype(x))
    lists, finite = _candidates(x, middle, n)
    first_token = torch.arange(0, batch * tokens, tokens)[:, None, None]
    lists.indices.add_(first_token)
    lists = Lists(*(t.flatten(0, 1) for t in lists))
    rows = x.flatten(0, 1)
    measure = partial(squared_differences if finite else pair_distances, rows[None])
    if by_products:
        found = _distances_by_products(lists, k, width)
    elif measure_all:
        found = _nothing_found(lists, k, rows)
    else:
        found = _k_distances(lists, k, width, partial(measure, queries=rows[None]))
    places = found.undecided.nonzero()[:, 0]
    for some in places.split(max(1, tiles.WORKSPACE_BYTES // 4 // (n * 48))):
        kept = Lists(*(t[None, some] for t in lists))
        asking = partial(measure, queries=rows[None, some])
        distances, indices = settle_last(kept.indices, k, n_measured, asking)
        is_open = undecided(
            kept.scores, kept.norms, distances[..., -1], n_measured, width, n == tokens - 1
        )
        if measure_all:  # more than k equal tokens, which go by their index
            is_open |= distances[..., -1] == 0
        found.distances[some] = distances[0, :, -found.distances.shape[1] :]
        found.indices[some], found.undecided[some] = indices[0], is_open[0]
    found = Found(*(t.unflatten(0, (batch, tokens)) for t in found))
    found.indices.sub_(first_token)
    return found


def _k_distances(lists: Lists, k: int, width: int, measure: Measure) -> Found:
    """Measures the k-th candidate of each row, and keeps the ones before it as they are."""
    indices = lists.indices[:, :k]
    distances = measure(indices[None, :, -1:])[0]
    # With the next candidate as the last of the list, the certificate holds all others back.
    scores = lists.scores[:, : k + 1]
    n_measured, complete = scores.shape[1] - k + 1, scores.shape[1] == k
    is_open = undecided(scores, lists.norms, distances[:, 0], n_measured, width, complete)
    return Found(distances, indices, is_open)


def _distances_by_products(lists: Lists, k: int, width: int) -> Found:
    """Distances from products in float64. Their rounding is at most a quarter of float32's."""
    squares = lists.scores[:, : k + 1] + lists.norms.square().unsqueeze(1)
    distances = squares.clamp(min=0).float()
    error = error_bound(lists.norms, squares[:, 0].clamp(min=0).sqrt(), width)
    is_open = ~(error <= 2**-26 * squares[:, 0])  # the nearest has the largest relative error
    is_open |= (distances[:, 1:] == distances[:, :-1]).any(dim=1)  # equal ones go by their index
    is_open |= ~distances[:, k - 1].isfinite()
    return Found(distances[:, :k], lists.indices[:, :k], is_open)


def _nothing_found(lists: Lists, k: int, rows: Tensor) -> Found:
    """Leaves every row undecided."""
    distances = rows.new_empty(len(rows), k, dtype=compute_dtype(rows))
    is_open = torch.ones(len(rows), dtype=torch.bool)
    return Found(distances, torch.empty_like(lists.indices[:, :k]), is_open)


def _candidates(tokens: Tensor, middle: Tensor, n: int) -> tuple[Lists, bool]:
    """The n others with the smallest scores for each of the tokens (b, N, D), n < N.

    Args:
        middle: (b, 1, D), as for `Candidates`; its dtype is that of the products.

    Returns:
        The lists of (b, N) rows, and whether the norms of all tokens are finite.
    """
    y, squares = centred(tokens, middle)
    finite = bool((squares < torch.finfo(squares.dtype).max).all())
    batch, total, _ = y.shape
    pairs = tile_pairs(total, y.dtype)
    workspace = y.new_empty(1 if len(pairs) == 1 else 2, batch * pairs[0][0].stop ** 2)
    lists: dict[int, tuple[Tensor, Tensor]] = {}
    for rows, columns in tiles.each_tile.get()(pairs):
        shape = batch, rows.stop - rows.start, columns.stop - columns.start
        tile = workspace[0, : math.prod(shape)].view(shape)
        y_rows = y[:, rows]
        on_diagonal = rows == columns
        gram(y_rows, y_rows if on_diagonal else y[:, columns], tile, DEPTH)
        if not on_diagonal:
            flipped = workspace[1, : math.prod(shape)].view(batch, *shape[:0:-1])
            torch.sub(squares[:, None, rows], tile.mT, alpha=2, out=flipped)
            lists[columns.start] = _merged(lists.get(columns.start), flipped, rows.start, n)
        torch.sub(squares[:, None, columns], tile, alpha=2, out=tile)
        if on_diagonal:
            tile.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        lists[rows.start] = _merged(lists.get(rows.start), tile, columns.start, n)
    in_order = [lists[start] for start in sorted(lists)]
    scores, indices = (torch.cat(some, dim=1) for some in zip(*in_order, strict=True))
    return Lists(scores, indices, squares.sqrt()), finite


def _merged(
    kept: tuple[Tensor, Tensor] | None, scores: Tensor, first: int, n: int
) -> tuple[Tensor, Tensor]:
    """The n smallest of the scores kept for each row and scores (b, r, c) of columns from first."""
    values, indices = scores.topk(min(n, scores.shape[-1]), largest=False)
    if first:
        indices += first
    if kept is not None:
        values = torch.cat([kept[0], values], dim=-1)
        values, order = values.topk(min(n, values.shape[-1]), largest=False)
        indices = torch.cat([kept[1], indices], dim=-1).gather(-1, order)
    return values, indices


def _sum_length(width: int) -> int:
    """The number of roundings in a product of `width` channels by `gram`."""
    return min(width, DEPTH) + (-(-width // DEPTH) - 1)
