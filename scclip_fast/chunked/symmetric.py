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
from .certificate import Found, counts, error_bound, undecided
from .distances import pair_distances, settle_last, squared_differences
from .gram import gram, images_per_step, roundings, tile_pairs
from .tiles import compute_dtype, spans

#: Channels of one product. More channels are summed over products, so that rounding grows with
#: DEPTH + D / DEPTH instead of D, for 5 % of the time of the products.
DEPTH = 256
FLIPPED_ROWS = 512  # rows of a tile below the diagonal, which is copied from the one above
FLOAT64_TOKENS = 3072  # above, measuring the candidates takes less time than products in float64


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
    batch, tokens, width = x.shape
    n, n_measured = list_sizes(k, tokens - 1, measure_all)
    in_float32 = compute_dtype(x) == torch.float32
    by_products = measure_all and in_float32 and tokens <= FLOAT64_TOKENS
    lists, finite = _candidates(x, centre(x, torch.float64 if by_products else compute_dtype(x)), n)
    first_token = torch.arange(0, batch * tokens, tokens)[:, None, None]
    lists.indices.add_(first_token)  # among the tokens of all images
    lists = Lists(*(t.flatten(0, 1) for t in lists))
    rows = x.flatten(0, 1)
    measure = partial(squared_differences if finite else pair_distances, rows[None])
    certify = partial(undecided, width=width, roundings=roundings(width, DEPTH))
    if by_products:
        found = _distances_by_products(lists, k, width)
    elif measure_all:
        found = _nothing_found(lists, k, rows)
    else:
        found = _k_distances(lists, k, partial(measure, queries=rows[None]), certify)
    places = found.undecided.nonzero()[:, 0]
    counts["candidates"] += len(places)
    for some in places.split(max(1, tiles.WORKSPACE_BYTES // 4 // (n * 48))):
        kept = Lists(*(t[None, some] for t in lists))
        asking = partial(measure, queries=rows[None, some])
        distances, indices = settle_last(kept.indices, k, n_measured, asking)
        is_open = certify(
            kept.scores, kept.norms, distances[..., -1], n_measured, complete=n == tokens - 1
        )
        if measure_all:  # more than k equal tokens, which go by their index
            is_open |= distances[..., -1] == 0
        found.distances[some] = distances[0, :, -found.distances.shape[1] :]
        found.indices[some], found.undecided[some] = indices[0], is_open[0]
    found = Found(*(t.unflatten(0, (batch, tokens)) for t in found))
    found.indices.sub_(first_token)
    return found


def _k_distances(
    lists: Lists, k: int, measure: Callable[[Tensor], Tensor], certify: Callable[..., Tensor]
) -> Found:
    """Measures the k-th candidate of each row, and keeps the ones before it as they are.

    Args:
        measure: takes candidates (1, R, m) to their squared distances.
        certify: `undecided` for the products of the lists.
    """
    indices = lists.indices[:, :k]
    distances = measure(indices[None, :, -1:])[0]
    # With the next candidate as the last of the list, the certificate holds all others back.
    scores = lists.scores[:, : k + 1]
    n_measured, complete = scores.shape[1] - k + 1, scores.shape[1] == k
    is_open = certify(scores, lists.norms, distances[:, 0], n_measured, complete=complete)
    return Found(distances, indices, is_open)


def _distances_by_products(lists: Lists, k: int, width: int) -> Found:
    """Distances from products in float64. Their rounding is at most a quarter of float32's."""
    squares = lists.scores[:, : k + 1] + lists.norms.square().unsqueeze(1)
    distances = squares.clamp(min=0).float()
    error = error_bound(lists.norms, squares[:, 0].clamp(min=0).sqrt(), roundings(width, DEPTH))
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
    batch, total, _ = tokens.shape
    scores = middle.new_full((batch, total, n), torch.inf)
    indices = torch.zeros(batch, total, n, dtype=torch.int64)
    squares = middle.new_empty(batch, total)
    pairs = tile_pairs(total, middle.dtype)
    side = pairs[0][0].stop
    workspace = middle.new_empty(batch * side * side)
    flipped = middle.new_empty(batch, side if len(pairs) > 1 else 0, FLIPPED_ROWS)
    for rows, columns in tiles.each_tile.get()(pairs):
        y, squares[:, columns] = centred(tokens[:, columns], middle, depth=DEPTH)
        on_diagonal = rows == columns
        if on_diagonal:  # the first tile of these rows
            y_rows = y
        shape = batch, y_rows.shape[1], y.shape[1]
        tile = gram(y_rows, y, workspace[: math.prod(shape)].view(shape), DEPTH)
        for part in () if on_diagonal else spans(shape[2], FLIPPED_ROWS):
            turned = flipped.view(batch, -1)[:, : shape[1] * (part.stop - part.start)]
            turned = turned.view(batch, -1, shape[1])
            torch.sub(squares[:, None, rows], tile[:, :, part].mT, alpha=2, out=turned)
            own = slice(columns.start + part.start, columns.start + part.stop)
            _merge(scores[:, own], indices[:, own], turned, rows.start)
        torch.sub(squares[:, None, columns], tile, alpha=2, out=tile)
        if on_diagonal:
            tile.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        _merge(scores[:, rows], indices[:, rows], tile, columns.start)
    finite = bool((squares < torch.finfo(squares.dtype).max).all())
    return Lists(scores, indices, squares.sqrt()), finite


def _merge(best_scores: Tensor, best_indices: Tensor, scores: Tensor, first: int) -> None:
    """Merges scores (b, r, c), whose columns count from `first`, into the best so far (b, r, n).

    The tiles of the first columns are the first ones of all rows.
    """
    n = best_scores.shape[-1]
    values, indices = scores.topk(min(n, scores.shape[-1]), largest=False)
    if first:
        values = torch.cat([best_scores, values], dim=-1)
        values, order = values.topk(n, largest=False)
        indices = torch.cat([best_indices, indices.add_(first)], dim=-1).gather(-1, order)
    best_scores[..., : values.shape[-1]], best_indices[..., : values.shape[-1]] = values, indices
