"""Nearest neighbours on the torch path, in up to three passes.

    d2(i, j) - ||x_i||^2 = ||x_j||^2 - 2 x_i x_j

ranks like the distance along a row and costs one matrix product, but its rounding is that of the
norms, not that of the distance. Three passes make the result exact:

1. Products find a few candidates more than k for each row (`candidates.py`). The candidates'
   distances are measured as sums of squared differences (`distances.py`), and `certificate.py`
   bounds what the rounding of the products can have done to the row.
2. Rows that the bound leaves undecided are searched again by products in float64.
3. Rows that float64 leaves undecided are searched by measured differences to all tokens.

The k neighbours of a row are therefore the k tokens with the smallest measured distance, ties by
the lower index, whatever the tiles were.

To list the undecided rows, the host waits for a GPU, which the Triton path never does. A CUDA graph
cannot capture that: while one is captured, the third pass searches all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import tiles
from .candidates import Candidates, list_sizes
from .certificate import Found, counts, undecided_lists, undecided_products
from .distances import finite_tokens, settle_last
from .symmetric import has_room, search_symmetric
from .tiles import Tile, compute_dtype, plan, spans
from .topk import GROUP


def nearest(
    x: Tensor,
    k: int,
    queries: Tensor | None = None,
    *,
    measure_all: bool = True,
    dtype: torch.dtype | None = None,
    kind: type[Candidates] = Candidates,
) -> tuple[Tensor, Tensor]:
    """The k tokens of x (B, N, D) nearest to each query (B, M, D), certified.

    Args:
        x: float16 to float64.
        k: at most N, or N - 1 without queries.
        queries: rows that are computed in the dtype of x. Without them, the nearest others of every
            token of x.
        measure_all: False to return the distance of the k-th neighbour alone, for which fewer
            candidates need to be measured.
        dtype: dtype of the products of the first pass; by default that of the distances.
        kind: `ProductCandidates` to find the smallest -q x_j, in float64, in place of distances.

    Returns:
        Squared distances (B, M, k), ascending, or (B, M, 1), and indices (B, M, k) int64. Without
        measure_all, the k-th neighbour is the last and the others come in any order. A pair with
        a token that is not finite has the distance NaN and comes last; a square that overflows is
        infinite.
    """
    rows, first_token = (x, 0) if queries is None else (queries, None)
    if _is_captured(x):
        return _search(x, rows, first_token, k, None, kind, measure_all)[:2]
    counts["product"] += rows.shape[0] * rows.shape[1]
    among_itself = queries is None and kind is Candidates and has_room(x, k)
    found = search_symmetric(x, k, measure_all) if among_itself else None
    if found is None:
        found = _search(x, rows, first_token, k, dtype or compute_dtype(x), kind, measure_all)
    for image, places in _finite_rows(rows, found.undecided):
        one = slice(image, image + 1)
        again = partial(_search_some, x[one], rows[one], queries is None, k, kind)
        passes = [partial(again, name="float64"), partial(again, name="differences")]
        search_again(found.distances[image], found.indices[image], places, passes)
    return found.distances, found.indices


def search_again(
    distances: Tensor,
    indices: Tensor,
    places: Tensor,
    passes: Iterable[Callable[[Tensor], Found]],
    any_rank: Callable[[bool], bool] = bool,
) -> None:
    """Searches undecided rows by one pass after the other, until every row is decided.

    Args:
        distances: (M, k) or (M, 1) and
        indices: (M, k) of all rows, overwritten where a row is searched.
        places: (R,) of the undecided rows among all.
        passes: functions that search the rows at some places (R,), with all distances (R, k).
        any_rank: where several processes search together, tells whether a condition holds on one of
            them, because all have to take part in a pass.
    """
    for search in passes:
        if not any_rank(len(places) > 0):
            return
        found = search(places)
        distances[places] = found.distances[:, -distances.shape[-1] :]
        indices[places] = found.indices
        places = places[found.undecided]


def _search_some(
    x: Tensor,
    rows: Tensor,
    among_itself: bool,
    k: int,
    kind: type[Candidates],
    places: Tensor,
    name: str,
) -> Found:
    """The second or the third pass, over the rows at some places (R,) of one image.

    Args:
        x, rows, k, kind: as for `_search`, of one image.
        among_itself: True if the rows are the tokens of x.
        name: "float64" or "differences".
    """
    counts[name] += len(places)
    self_index = places if among_itself else None
    dtype = torch.float64 if name == "float64" and x.device.type != "mps" else None
    found = _search(x, rows[:, places], self_index, k, dtype, kind, True)
    return Found(*(tensor[0] for tensor in found))


def _search(
    x: Tensor,
    rows: Tensor,
    self_index: int | Tensor | None,
    k: int,
    dtype: torch.dtype | None,
    kind: type[Candidates],
    measure_all: bool,
) -> Found:
    """One pass over all rows (B, M, D): candidates among x (B, N, D), their order, the certificate.

    Args:
        self_index: as for `Candidates`.
        dtype: dtype of the products; None to measure all pairs, which decides every row.
        kind: as for `nearest`.
    """
    batch, tokens, _ = x.shape
    n_rows = rows.shape[1]
    measured_dtype = kind.measured_dtype(x)
    tile = tile_of(batch, tokens, x.shape[-1], k, _longer(dtype, measured_dtype), n_rows)
    others = tokens - (self_index is not None)
    n_candidates, n_measured = list_sizes(k, others, measure_all)
    group = max(1, rows_of_lists(tile.images, n_candidates) // tile.rows) * tile.rows
    step, n_distances = min(tile.rows, n_rows), k if measure_all else 1
    distances = torch.empty(batch, n_rows, n_distances, dtype=measured_dtype, device=x.device)
    indices = torch.empty(batch, n_rows, k, dtype=torch.int64, device=x.device)
    is_open = torch.zeros(batch, n_rows, dtype=torch.bool, device=x.device)
    for images in spans(batch, tile.images):
        block = x[images]
        middle = None if dtype is None else kind.centre(block, dtype)
        finite = finite_tokens(block)
        for span in spans(n_rows, group):
            span_index = _at(self_index, span)
            candidates = kind(rows[images, span], n_candidates, step, span_index, middle)
            for columns in tiles.each_tile.get()(list(spans(tokens, tile.columns))):
                candidates.add(block[:, columns], columns.start)
            measure = partial(kind.measure, block, queries=rows[images, span], finite=finite)
            nearest_distances, indices[images, span] = settle_last(
                candidates.indices, k, n_measured, measure
            )
            distances[images, span] = nearest_distances[..., -n_distances:]
            if dtype is not None:
                row_norms = candidates.norms, nearest_distances[..., -1]
                complete = n_candidates == others
                is_open[images, span] = (
                    undecided_lists(
                        candidates.squares(), *row_norms, n_measured, x.shape[-1], complete
                    )
                    if kind is Candidates
                    else undecided_products(candidates.scores, *row_norms, x.shape[-1], complete)
                )
    return Found(distances, indices, is_open)


def _at(self_index: int | Tensor | None, span: slice) -> int | Tensor | None:
    """The `self_index` of the rows `span` alone."""
    if isinstance(self_index, Tensor):
        return self_index[span]
    return None if self_index is None else self_index + span.start


def _longer(dtype: torch.dtype | None, other: torch.dtype) -> torch.dtype:
    return other if dtype is None else torch.promote_types(dtype, other)


def tile_of(
    batch: int,
    tokens: int,
    width: int,
    k: int,
    dtype: torch.dtype,
    n_rows: int | None = None,
) -> Tile:
    """The tile of a search for k neighbours: of its columns, k groups are read once more.

    Args:
        n_rows: number of rows of an image, by default that of its tokens.
    """
    copies = 1 + 6 * min(1, k * GROUP / tokens)
    return plan(batch, tokens, width, dtype, copies, n_rows)


def rows_of_lists(images: int, k: int) -> int:
    """The number of rows whose lists of k candidates fit a part of the workspace while sorted."""
    return tiles.WORKSPACE_BYTES // 4 // (images * k * 48)


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _finite_rows(rows: Tensor, is_open: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields each image with finite undecided rows (B, M), and places (R,) of some of these rows.

    No search can help a row that is not finite. The rows of one step, in float64, fit a part of the
    workspace.
    """
    rows_per_step = max(1, tiles.WORKSPACE_BYTES // 16 // (8 * rows.shape[-1]))
    for image in is_open.any(dim=1).nonzero()[:, 0].tolist() if is_open.any() else ():
        places = is_open[image].nonzero()[:, 0]
        places = places[finite_tokens(rows[image, places])]
        for some in places.split(rows_per_step):
            if len(some):
                yield image, some
