"""The search among the tokens themselves on a CPU, with each product of two tokens made once.

Measuring a distance reads the features of two tokens, which takes longer than their product. So the
first look measures as little as it can, and only rows that it leaves open have their candidates
measured as in `search.py`:

- For a k-distance, the k-th candidate alone is measured.
- For all distances, the candidates' products in float64 stand for measured distances. Rows with
  neighbours that are nearly equal to the token stay open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import tiles
from .candidates import centre, list_sizes
from .certificate import Found, counts, error_bound, undecided, undecided_lists
from .distances import distances_by_products, settle_last, squared_differences
from .gram import images_per_step
from .symmetric_lists import Lists, candidate_lists
from .tiles import Scratch, compute_dtype, spans
from .topk import smallest

#: Images of at most that many tokens have all products in float64, if all distances are asked for.
#: With more, the candidates' products are repeated in float64: `knn` of 441 tokens takes 6.5 ms so,
#: and 4.6 ms in float64, of 784 tokens 13.7 and 12.0 ms, of 1024 20.3 and 19.3 ms (one core).
FLOAT64_TOKENS = 800


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
    parts, scratch = [], Scratch()
    for images in spans(len(x), images_per_step(x.shape[1], x.shape[2], dtype)):
        found = _search_images(x[images], k, measure_all, dtype, scratch)
        if found is None:
            return None
        parts.append(found)
    return _joined(parts)


def _joined(parts: list[Found]) -> Found:
    return parts[0] if len(parts) == 1 else Found(*map(torch.cat, zip(*parts, strict=True)))


def _search_images(
    x: Tensor, k: int, measure_all: bool, dtype: torch.dtype, scratch: Scratch
) -> Found | None:
    """`search_symmetric` of a few images.

    Args:
        dtype: of the products.
    """
    batch, tokens, width = x.shape
    n, n_measured = list_sizes(k, tokens - 1, measure_all)
    middle = centre(x, dtype)
    lists = candidate_lists(x, middle, n, scratch)
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
    elif dtype == torch.float64:
        found = _rounded_distances(lists, k, width)
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
    squares, indices = lists.squares, lists.indices[:, :k]
    distances = squared_differences(rows[None], indices[None, :, -1:], rows[None])[0]
    is_open = undecided(
        lists.norms,
        distances[:, 0],
        rows.shape[1],
        dropped=squares[:, k] if squares.shape[1] > k else None,
        unmeasured=squares[:, k - 2] if k > 1 else None,
    )
    return Found(distances, indices.contiguous(), is_open)


def _distances(lists: Lists, k: int, x: Tensor, middle: Tensor, rows: slice) -> Found:
    """The nearest candidates of some rows of all images, whose products are repeated in float64.

    Args:
        x, middle: as for `distances_by_products`.
    """
    squares, indices, norms = (t[rows] for t in lists)
    exact = distances_by_products(x, middle, indices, rows).clamp_(min=0).float()
    exact, order = smallest(exact, min(k + 1, exact.shape[1]))
    is_open = _is_inexact(norms, exact, x.shape[-1])
    is_open |= (exact[:, 1:] == exact[:, :-1]).any(dim=1)  # equal ones go by their index
    if squares.shape[1] > k:
        is_open |= undecided(norms, exact[:, k - 1], x.shape[-1], squares[:, -1], None)
    return Found(exact[:, :k].contiguous(), indices.gather(1, order[:, :k]), is_open)


def _rounded_distances(lists: Lists, k: int, width: int) -> Found:
    """The nearest candidates, whose squares are products in float64 that were rounded to float32.

    If the bound holds for the nearest, it holds for all tokens, so that none is missing.
    """
    distances = lists.squares[:, :k].clamp(min=0)
    is_open = _is_inexact(lists.norms, distances, width)
    return Found(distances, lists.indices[:, :k].contiguous(), is_open)


def _is_inexact(norms: Tensor, distances: Tensor, width: int) -> Tensor:
    """Rows whose ascending distances may err by more than 2^-26, a quarter of float32's rounding.

    Args:
        distances: (R, k) squared, by products in float64.
    """
    nearest = distances[:, 0].double()  # with the largest relative error
    return ~(error_bound(norms.double(), nearest.sqrt(), width) <= 2**-26 * nearest)


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
    squares, candidates = lists.squares[some], lists.indices[some]

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
