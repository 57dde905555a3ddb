"""The search among the tokens themselves on a CPU, with each product of two tokens made once.

Measuring a distance reads the features of two tokens, which takes longer than their product. So the
first look measures as little as it can, and only rows that it leaves open have their candidates
measured as in `search.py`:

- For a k-distance, the k-th candidate alone is measured.
- For all distances, the candidates' products in float64 stand for measured distances. Rows with
  neighbours that are nearly equal to the token, or equally far, stay open.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import tiles
from .candidates import centre, list_sizes
from .certificate import Found, counts, error_bound, undecided, undecided_lists
from .distances import distances_by_products, settle_last, squared_differences
from .gram import gram, images_per_step, tile_pairs
from .tiles import compute_dtype, spans
from .topk import STRIDED, largest, smallest_unordered

FLIPPED_ROWS = 512  # rows of a tile below the diagonal, which is copied from the one above
TILE_MULTIPLE = STRIDED**2  # columns of a tile, for two steps of `smallest_unordered`
#: Images of at most that many tokens have all products in float64, if all distances are asked for.
#: With more, it is faster to repeat the candidates' products: `knn` of 441 tokens takes 6.6 ms so,
#: and 10.2 ms in float64; of 196 tokens 2.6 and 1.9 ms (one core).
FLOAT64_TOKENS = 320


class Lists(NamedTuple):
    """The candidates of the rows of all images, in any order."""

    squares: Tensor  # (R, n), the estimates c of `certificate.py`
    indices: Tensor  # (R, n), among the tokens of all images
    norms: Tensor  # (R,), of the centred rows


def has_room(x: Tensor, k: int) -> bool:
    """True on a CPU if the candidates of all rows of an image fit the workspace."""
    row_bytes = 12 * sum(list_sizes(k, x.shape[1] - 1, True)[:1])
    return x.device.type == "cpu" and 0 < len(x) and x.shape[1] * row_bytes <= tiles.WORKSPACE_BYTES


def search_symmetric(x: Tensor, k: int, measure_all: bool) -> Found | None:
    """The first pass of `search.nearest`, by products, for every token of x (B, N, D).

    Args:
        measure_all: as for `nearest`.

    Returns:
        None if a token is not finite, or so far away that squares come near an overflow.
    """
    in_float64 = measure_all and x.shape[1] <= FLOAT64_TOKENS
    dtype = torch.float64 if in_float64 else compute_dtype(x)
    parts = []
    for images in spans(len(x), images_per_step(x.shape[1], x.shape[2], dtype)):
        found = _search_images(x[images], k, measure_all, dtype)
        if found is None:
            return None
        parts.append(found)
    return _joined(parts)


def _joined(parts: list[Found]) -> Found:
    return parts[0] if len(parts) == 1 else Found(*map(torch.cat, zip(*parts, strict=True)))


def _search_images(x: Tensor, k: int, measure_all: bool, dtype: torch.dtype) -> Found | None:
    """`search_symmetric` of a few images.

    Args:
        dtype: of the products.
    """
    batch, tokens, width = x.shape
    n, n_measured = list_sizes(k, tokens - 1, measure_all)
    middle = centre(x, dtype)
    lists = _candidates(x, middle, n)
    if lists is None:
        return None
    if batch > 1:
        first_token = torch.arange(0, batch * tokens, tokens)[:, None, None]
        lists.indices.view(batch, tokens, n).add_(first_token)
    rows = x.reshape(-1, width)
    rows_per_step = max(1, tiles.WORKSPACE_BYTES // 4 // (n * 48))
    if not measure_all:
        found = _k_distances(lists, k, rows)
    elif compute_dtype(x) == torch.float64:
        found = _nothing_found(lists, k)
    else:
        steps = spans(len(rows), rows_per_step)
        found = _joined([_distances(lists, k, x, middle, some) for some in steps])
    places = found.undecided.nonzero()[:, 0]
    counts["candidates"] += len(places)
    for some in places.split(rows_per_step) if len(places) else ():
        _measure_candidates(found, lists, some, k, n_measured, rows, complete=n == tokens - 1)
    found = Found(*(t.view(batch, tokens, *t.shape[1:]) for t in found))
    if batch > 1:
        found.indices.sub_(first_token)
    return found


def _k_distances(lists: Lists, k: int, rows: Tensor) -> Found:
    """Measures the k-th candidate of each row, and keeps the ones before it as they are."""
    n_rows, n = lists.indices.shape
    # Descending: the n - k candidates after the k-th, the k-th, and the one before it.
    last, places = largest(lists.squares, min(n, n - k + 2))
    kth = lists.indices.gather(1, places[:, n - k, None])
    distances = squared_differences(rows[None], kth[None], rows[None])[0]
    is_open = undecided(
        lists.norms,
        distances[:, 0],
        rows.shape[1],
        dropped=last[:, n - k - 1] if n > k else None,
        unmeasured=last[:, n - k + 1] if k > 1 else None,
    )
    kept = torch.ones(n_rows, n, dtype=torch.bool).scatter_(1, places[:, : n - k], False)
    return Found(distances, lists.indices.masked_select(kept).view(n_rows, k), is_open)


def _distances(lists: Lists, k: int, x: Tensor, middle: Tensor, rows: slice) -> Found:
    """The nearest candidates of some rows of all images, by products in float64.

    The rounding of these squared distances is at most a quarter of float32's.

    Args:
        x, middle: as for `distances_by_products`.
    """
    lists = Lists(*(t[rows] for t in lists))
    in_float64 = middle.dtype == torch.float64
    squares = lists.squares if in_float64 else distances_by_products(x, middle, lists.indices, rows)
    # Integers in the order of the distances are sorted in two thirds of the time.
    keys, order = squares.clamp(min=0).float().view(torch.int32).sort(dim=1)
    distances = keys[:, : k + 1].view(torch.float32)
    nearest = distances[:, 0].double()  # with the largest relative error
    error = error_bound(lists.norms.double(), nearest.sqrt(), x.shape[-1])
    is_open = ~(error <= 2**-26 * nearest)
    is_open |= (distances[:, 1:] == distances[:, :-1]).any(dim=1)  # equal ones go by their index
    if not in_float64 and lists.squares.shape[1] > k:
        dropped = lists.squares.amax(dim=1)
        is_open |= undecided(lists.norms, distances[:, k - 1], x.shape[-1], dropped, None)
    return Found(distances[:, :k].contiguous(), lists.indices.gather(1, order[:, :k]), is_open)


def _nothing_found(lists: Lists, k: int) -> Found:
    """Leaves every row undecided."""
    distances = torch.empty_like(lists.squares[:, :k])
    is_open = torch.ones(len(distances), dtype=torch.bool)
    return Found(distances, torch.empty_like(lists.indices[:, :k]), is_open)


def _measure_candidates(
    found: Found, lists: Lists, some: Tensor, k: int, n_measured: int, rows: Tensor, complete: bool
) -> None:
    """Overwrites what was found for some rows (r,), by measuring their last candidates.

    Args:
        n_measured, complete: as for `undecided_lists`.
        rows: (R, D), the tokens of all images.
    """
    squares, order = lists.squares[some].sort(dim=1)
    candidates = lists.indices[some].gather(1, order)

    def measure(candidates: Tensor) -> Tensor:
        return squared_differences(rows[None], candidates[None], rows[None, some])[0]

    distances, indices = settle_last(candidates, k, n_measured, measure)
    k_distance = distances[:, -1]
    is_open = undecided_lists(
        squares, lists.norms[some], k_distance, n_measured, rows.shape[1], complete
    )
    n_distances = found.distances.shape[1]
    if n_distances == k > 1:  # more than k equal tokens, which go by their index
        is_open |= k_distance == 0
    found.distances[some] = distances[:, -n_distances:]
    found.indices[some], found.undecided[some] = indices, is_open


def _candidates(tokens: Tensor, middle: Tensor, n: int) -> Lists | None:
    """The n others with the smallest squared distances for each of the tokens (b, N, D), n < N.

    Args:
        middle: (b, 1, D), as for `Candidates`; its dtype is that of the products.

    Returns:
        The lists of (b N) rows, with indices among the tokens of an image. None if the norm of a
        centred token is not finite, or its square is more than a 16th of the largest number.
    """
    batch, total, _ = tokens.shape
    largest = torch.finfo(middle.dtype).max ** 0.5 / 4
    best = middle.new_empty(batch, total, n), torch.empty(batch, total, n, dtype=torch.int64)
    norms = middle.new_empty(batch, total)
    pairs = tile_pairs(total, middle.dtype)
    side = pairs[0][0].stop
    tile_width = side + TILE_MULTIPLE
    workspace = middle.new_empty(batch * side * tile_width)
    flipped = middle.new_empty(batch * FLIPPED_ROWS * tile_width if len(pairs) > 1 else 0)
    for rows, columns in tiles.each_tile.get()(pairs):
        y = tokens[:, columns].to(middle.dtype) - middle
        norms[:, columns] = norm = torch.linalg.vector_norm(y, dim=-1)
        if not norm.amax() < largest:
            return None
        squares = norm.square()
        on_diagonal = rows == columns
        if on_diagonal:  # the first tile of these rows
            y_rows, row_squares = y, squares
        tile = _tile(workspace, batch, y_rows.shape[1], y.shape[1])
        gram(y_rows, y, tile[..., : y.shape[1]], (row_squares, squares))
        for part in () if on_diagonal else spans(y.shape[1], FLIPPED_ROWS):
            turned = _tile(flipped, batch, part.stop - part.start, y_rows.shape[1])
            turned[..., : y_rows.shape[1]] = tile[..., part].mT
            own = slice(columns.start + part.start, columns.start + part.stop)
            _merge(best, own, turned, rows.start)
        if on_diagonal:
            tile.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        _merge(best, rows, tile, columns.start)
    return Lists(best[0].flatten(0, 1), best[1].flatten(0, 1), norms.flatten())


def _tile(workspace: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """A tile (batch, rows, c) in the workspace, where columns that only fill it up are infinite."""
    width = -(-columns // TILE_MULTIPLE) * TILE_MULTIPLE
    tile = workspace[: batch * rows * width].view(batch, rows, width)
    tile[..., columns:] = torch.inf
    return tile


def _merge(best: tuple[Tensor, Tensor], rows: slice, tile: Tensor, first: int) -> None:
    """Merges a tile (b, r, c), whose columns count from `first`, into the best of some rows so far.

    Args:
        best: squared distances and indices (b, N, n). The tiles of the first columns are the first
            ones of all rows.
    """
    n = best[0].shape[-1]
    values, indices = smallest_unordered(tile, min(n, tile.shape[-1]))
    if first:
        values = torch.cat([best[0][:, rows], values], dim=-1)
        indices = torch.cat([best[1][:, rows], indices.add_(first)], dim=-1)
        values, order = smallest_unordered(values, n)
        indices = indices.gather(-1, order)
    found = values.shape[-1]
    best[0][:, rows, :found], best[1][:, rows, :found] = values, indices
    best[0][:, rows, found:] = torch.inf
