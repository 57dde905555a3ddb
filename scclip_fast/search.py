"""Nearest neighbours on the torch path, tile by tile within `chunked.WORKSPACE_BYTES`.

    d2(i, j) - ||x_i||^2 = ||x_j||^2 - 2 x_i x_j

ranks like the distance along a row and costs one matrix product, but its rounding is that of the
norms, not that of the distance. Three passes make the result exact:

1. The products find a few candidates more than k for each row. The candidates' distances are
   measured as sums of squared differences, and `certificate.py` bounds what the rounding of the
   products can have done to the row.
2. Rows that the bound leaves undecided are searched again by products in float64.
3. Rows that float64 leaves undecided are searched by measured differences to all tokens.

The k neighbours of a row are therefore the k tokens with the smallest measured distance, ties by
the lower index, whatever the tiles were.

To list the undecided rows, the host waits for a GPU, which the Triton path never does. A CUDA graph
cannot capture that: while one is captured, the third pass searches all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import chunked, progress
from .certificate import undecided
from .chunked import compute_dtype, plan, spans
from .selection import GROUP, smallest, smallest_grouped

#: Rows searched so far in this process: "product" counts those of the first pass, "float64" and
#: "differences" those that the pass before left undecided.
counts: Counter[str] = Counter()


def band(k: int) -> int:
    """The number of candidates on either side of the k-th place that are measured.

    The distances of many neighbours lie closer together than those of a few.
    """
    return max(4, k // 8)


def candidates(k: int, others: int, every_distance: bool) -> tuple[int, int]:
    """Returns how many other tokens a search keeps for each row, and how many it measures."""
    wanted = min(k + band(k), others)
    return wanted, wanted if every_distance else min(wanted, wanted - k + band(k))


class Search:
    """The tokens nearest to rows (B, M, D), the tokens coming a few at a time.

    Args:
        rows: (B, M, D).
        k: number of tokens to keep for each row.
        step: number of rows in one product.
        own: which token each row is, so that it is not its own neighbour: the index of the first
            row where rows are consecutive tokens, or indices (M,); None where rows are no tokens.
        centre: (B, 1, D) in the dtype of the products, the point that both sides are centred on.
            Distances do not depend on it, and the products lose no digits to a common offset.
            Without a centre, the search measures differences instead of multiplying.

    Attributes:
        scores: (B, M, k) of the tokens kept so far, ascending: the module's left hand side, or the
            distance itself where there is no centre.
        indices: (B, M, k) of these tokens.
        norms: (B, M) of the centred rows.
    """

    def __init__(
        self,
        rows: Tensor,
        k: int,
        step: int,
        own: int | Tensor | None,
        centre: Tensor | None,
    ):
        self._rows, self._step, self._own, self._centre = rows, step, own, centre
        shape = (*rows.shape[:2], k)
        dtype = compute_dtype(rows) if centre is None else centre.dtype
        self.scores = rows.new_full(shape, torch.inf, dtype=dtype)
        self.indices = torch.zeros(shape, dtype=torch.int64, device=rows.device)
        self.norms = self.scores.new_empty(shape[:2])

    def see(self, tokens: Tensor, first: int) -> None:
        """Takes tokens (B, n, D) into account, whose indices count from `first`."""
        centre = self._centre
        score_tile = self._differences if centre is None else self._products(tokens, centre)
        width = -(-tokens.shape[1] // GROUP) * GROUP
        # One tile for all: an allocator hands out and takes back so large ones at a cost.
        scores = self.scores.new_empty(len(tokens), self._step, width)
        for part in spans(self._rows.shape[1], self._step):
            tile = scores[:, : part.stop - part.start]
            score_tile(tokens, part, tile)
            self._leave_out_own(tile, part, first)
            _keep_smallest(self.scores[:, part], self.indices[:, part], tile, first)

    def _products(self, tokens: Tensor, centre: Tensor) -> Callable[[Tensor, slice, Tensor], None]:
        columns, norms = _centred(tokens, centre, multiple=GROUP)

        def multiply(_: Tensor, part: slice, tile: Tensor) -> None:
            centred, squares = _centred(self._rows[:, part], centre)
            self.norms[:, part] = squares.sqrt()
            torch.baddbmm(norms.unsqueeze(1), centred, columns.mT, alpha=-2, out=tile)

        return multiply

    def _differences(self, tokens: Tensor, part: slice, tile: Tensor) -> None:
        rows, tokens = self._rows[:, part].to(tile.dtype), tokens.to(tile.dtype)
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(rows, tokens, compute_mode=mode)
        # Finite pairs come first, then those whose square overflows, then tokens that are not
        # finite, then what only fills up the tile.
        largest = torch.finfo(tile.dtype).max
        distances.masked_fill_(distances.isinf(), largest / 2)
        broken = ~finite_tokens(tokens)
        distances.masked_fill_(distances.isnan() | broken.unsqueeze(1), largest)
        n = tokens.shape[1]
        tile[..., :n], tile[..., n:] = distances, torch.inf

    def _leave_out_own(self, tile: Tensor, part: slice, first: int) -> None:
        if isinstance(self._own, Tensor):
            columns = torch.arange(first, first + tile.shape[-1], device=tile.device)
            tile.masked_fill_(self._own[part].unsqueeze(-1) == columns, torch.inf)
        elif self._own is not None:
            offset = self._own + part.start - first
            tile.diagonal(offset=offset, dim1=-2, dim2=-1).fill_(torch.inf)


def nearest(
    x: Tensor,
    k: int,
    queries: Tensor | None = None,
    *,
    every_distance: bool = True,
    exact: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k tokens of x (B, N, D) nearest to each query (B, M, D), certified.

    Args:
        x: float16 to float64.
        k: at most N, or N - 1 without queries.
        queries: rows of the dtype of x. Without them, the nearest others of every token of x.
        every_distance: False to measure the distance of the k-th neighbour alone.
        exact: x and queries as distances are measured, where that is in a longer dtype than the
            products.

    Returns:
        Squared distances (B, M, k), ascending, or (B, M, 1), and indices (B, M, k) int64. Without
        every distance, the k-th neighbour is the last and the others come in any order. A pair with
        a token that is not finite has the distance NaN and comes last; a square that overflows is
        infinite.
    """
    rows, own = (x, 0) if queries is None else (queries, None)
    measured = (x, rows) if exact is None else exact
    find = partial(_pass, k=k, measured=measured)
    if _is_captured(x):
        return find(*measured, own, dtype=None, every_distance=every_distance)[:2]
    counts["product"] += rows.shape[0] * rows.shape[1]
    dtype = compute_dtype(x)
    distances, indices, is_open = find(x, rows, own, dtype=dtype, every_distance=every_distance)
    for image, row in _finite_rows(rows, is_open):
        kept = slice(image, image + 1)
        again = partial(_search_again, x[kept], k=k, measured=[t[kept] for t in measured])
        found = again(rows[kept], row, None if own is None else row)
        distances[image, row], indices[image, row] = found[0][..., -distances.shape[-1] :], found[1]
    return distances, indices


def _search_again(
    x: Tensor, rows: Tensor, row: Tensor, own: Tensor | None, k: int, measured: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Distances and indices (R, k) of some rows of one image, by float64 or measured differences.

    x is (1, N, D), rows (1, M, D), row (R,) the places of those to search among all.
    """
    tokens, exact_rows = measured
    find = partial(_pass, k=k, every_distance=True)
    counts["float64"] += len(row)
    pair = (tokens, exact_rows[:, row])
    longest = None if x.device.type == "mps" else torch.float64  # which MPS does not have
    found = find(x, rows[:, row], own, dtype=longest, measured=pair)
    distances, indices = found[0][0], found[1][0]
    left = found[2][0].nonzero()[:, 0]
    if len(left):
        counts["differences"] += len(left)
        pair = (tokens, exact_rows[:, row[left]])
        part = None if own is None else own[left]
        found = find(*pair, part, dtype=None, measured=pair)
        distances[left], indices[left] = found[0][0], found[1][0]
    return distances, indices


def _pass(
    x: Tensor,
    rows: Tensor,
    own: int | Tensor | None,
    k: int,
    dtype: torch.dtype | None,
    measured: tuple[Tensor, Tensor],
    every_distance: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One search of all rows: distances, indices, and which rows it leaves undecided (B, M).

    dtype is that of the products; None to measure differences, which decides every row.
    """
    batch, tokens, width = x.shape
    asked = rows.shape[1]
    tile = tile_of(batch, tokens, width, k, dtype or compute_dtype(x))
    others = tokens - (own is not None)
    wanted, n_measured = candidates(k, others, every_distance)
    group = max(1, rows_of_lists(tile.images, wanted) // tile.rows) * tile.rows
    step, last = min(tile.rows, asked), k if every_distance else 1
    distances = torch.empty(batch, asked, last, dtype=compute_dtype(measured[0]), device=x.device)
    indices = torch.empty(batch, asked, k, dtype=torch.int64, device=x.device)
    is_open = torch.zeros(batch, asked, dtype=torch.bool, device=x.device)
    for images in spans(batch, tile.images):
        block = x[images]
        middle = None if dtype is None else centre(block, dtype)
        finite = finite_tokens(measured[0][images])
        for part in spans(asked, group):
            first = own[part] if isinstance(own, Tensor) else own if own is None else part.start
            search = Search(rows[images, part], wanted, step, first, middle)
            for columns in progress.steps(spans(tokens, tile.columns)):
                search.see(block[:, columns], columns.start)
            asking = measured[1][images, part]
            measure = partial(pair_distances, measured[0][images], queries=asking, finite=finite)
            found, indices[images, part] = settle_last(search.indices, k, n_measured, measure)
            distances[images, part] = found[..., -last:]
            if dtype is not None:
                complete = wanted == others
                is_open[images, part] = undecided(
                    search.scores, search.norms, found[..., -1], n_measured, width, complete
                )
    return distances, indices, is_open


def settle_last(
    candidates: Tensor, k: int, measured: int, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Indices (B, M, k) of the nearest and the squared distances of the last ones among them.

    The last `measured` of the candidates (B, M, c), which come ascending by their scores, are
    ordered by measured distances; those before them are neighbours without being measured.
    """
    settled, open_ = candidates.tensor_split([candidates.shape[-1] - measured], dim=-1)
    distances, chosen = settle(open_, k - settled.shape[-1], measure)
    return distances, torch.cat([settled, chosen], dim=-1)


def settle(
    candidates: Tensor, places: int, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Squared distances and indices (B, M, places), nearest first, of the candidates (B, M, m).

    measure takes candidates to squared distances; of equal ones, the lower index comes first.
    """
    candidates = candidates.sort(dim=-1).values
    distances, order = measure(candidates).sort(dim=-1, stable=True)
    return distances[..., :places], candidates.gather(-1, order[..., :places])


def tile_of(batch: int, tokens: int, width: int, k: int, dtype: torch.dtype) -> chunked.Tile:
    """The tile of a search for k neighbours: of its columns, k groups are read once more."""
    return plan(batch, tokens, width, dtype, copies=1 + 6 * min(1, k * GROUP / tokens))


def rows_of_lists(images: int, k: int) -> int:
    """The number of rows whose lists of k candidates fit a part of the workspace while sorted."""
    return chunked.WORKSPACE_BYTES // 4 // (images * k * 48)


def centre(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The `remedian` (B, 1, D) of a sample of the tokens (B, N, D).

    Any point is right; this one is near most tokens however far away a few of them are.
    """
    return remedian(tokens[:, sample(tokens.shape[1], tokens.device)].to(dtype))


def sample(tokens: int, device: torch.device) -> Tensor:
    """27 indices, evenly spread, of as many tokens as there are."""
    return torch.arange(27, device=device) * (tokens - 1) // 26


def remedian(tokens: Tensor) -> Tensor:
    """The median of medians of medians of three, (B, 1, D), of 27 tokens, channel by channel.

    An estimate of the median by elementwise operations alone (Rousseeuw and Bassett, "The
    remedian", JASA 1990): `nanmedian` takes 58 ms for 64 images of 768 channels on one core, this
    1 ms. Numbers that are not finite are left out, and 0 stands for the median of nothing else.
    """
    medians = tokens.masked_fill(tokens.isinf(), torch.nan)
    for _ in range(3):
        a, b, c = medians.chunk(3, dim=1)
        medians = torch.fmax(torch.fmin(a, b), torch.fmin(torch.fmax(a, b), c))
    return medians.nan_to_num(nan=0)


def finite_tokens(x: Tensor) -> Tensor:
    """Tells the tokens of x (B, N, D) that hold neither NaN nor infinity, as a mask (B, N)."""
    # The two extremes take a tenth of the time of isfinite().all() on a CPU.
    return x.amax(dim=-1).isfinite() & x.amin(dim=-1).isfinite()


def pair_distances(
    x: Tensor, neighbors: Tensor, queries: Tensor, finite: Tensor | None = None
) -> Tensor:
    """||q_i - x_j||^2 (B, M, m) for j in neighbors (B, M, m), exactly 0 for duplicates.

    The sum is over squared differences, whose rounding is that of the distance itself. Pairs with a
    token that is not finite get NaN.

    Args:
        x: (B, N, D).
        neighbors: indices into its tokens.
        queries: (B, M, D).
        finite: `finite_tokens(x)`, if known.
    """
    batch, asked, m = neighbors.shape
    dtype = compute_dtype(x)
    distances = torch.empty(batch, asked, m, dtype=dtype, device=x.device)
    rows_per_step = max(
        1, chunked.WORKSPACE_BYTES // 32 // max(1, m * x.shape[-1] * dtype.itemsize)
    )
    for image in range(batch):
        for rows in spans(asked, rows_per_step):
            others = x[image].index_select(0, neighbors[image, rows].flatten()).to(dtype)
            difference = others.unflatten(0, (-1, m)).sub_(queries[image, rows, None])
            distances[image, rows] = difference.square_().sum(dim=-1)
    finite = finite_tokens(x) if finite is None else finite
    usable = finite.gather(-1, neighbors.flatten(1)).view_as(neighbors)
    usable &= finite_tokens(queries).unsqueeze(-1)
    return distances.masked_fill_(~usable, torch.nan)


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _finite_rows(rows: Tensor, is_open: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields each image with finite open rows (B, M), and the places (R,) of some of these rows.

    No search can help a row that is not finite. The rows that are given at once, in float64, fit a
    part of the workspace.
    """
    at_once = max(1, chunked.WORKSPACE_BYTES // 16 // (8 * rows.shape[-1]))
    for image in is_open.any(dim=1).nonzero()[:, 0].tolist():
        places = is_open[image].nonzero()[:, 0]
        places = places[finite_tokens(rows[image, places])]
        for some in places.split(at_once):
            if len(some):
                yield image, some


def _centred(tokens: Tensor, centre: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """tokens (b, n, D) - centre and the squared norms (b, n), with n filled up to a multiple.

    A token whose norm is not finite is replaced by 0 with the largest finite norm; one that only
    fills up is 0 with an infinite norm. In this order they come last.
    """
    batch, n, width = tokens.shape
    missing = -n % multiple
    centred = centre.new_empty(batch, n + missing, width)
    centred[:, n:] = 0
    centred[:, :n].copy_(tokens)  # a subtraction of two dtypes would convert to a tensor of its own
    centred[:, :n] -= centre
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
