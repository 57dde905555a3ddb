"""The search for the rows of this rank among the rows of all ranks: that of `chunked/search.py`.

`kernel_search.py` takes its place where the kernels run.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..backend import resolve
from ..chunked import tiles
from ..chunked.candidates import Candidates, list_sizes, remedian, sample
from ..chunked.certificate import Found, undecided_lists
from ..chunked.distances import finite_tokens, pair_distances, settle_last
from ..chunked.search import search_again, tile_of
from ..chunked.tiles import Tile, compute_dtype
from ..ops.knn import MAX_NEIGHBORS
from .kernel_search import nearest_by_kernels
from .shards import Shards

PAIRS = 4096  # pairs of tokens that are measured at once, if the workspace has room


def nearest(shards: Shards, x: Tensor, k: int, measure_all: bool) -> tuple[Tensor, Tensor]:
    """Squared distances (n, k) or (n, 1) and indices (n, k), as `chunked.nearest` returns them.

    All ranks take part in each pass as long as one rank has an undecided row.

    Args:
        x: (n, D), this rank's rows.
    """
    if resolve(None, x) == "triton" and k < MAX_NEIGHBORS:
        distances, indices = nearest_by_kernels(shards, x, k)
        return (distances if measure_all else distances[:, -1:]), indices
    width = x.shape[1]
    dtype = compute_dtype(x)
    drawn = shards.rows_at(sample(shards.total, x.device), x.to(dtype))
    tile = tile_of(1, shards.total, width, k, dtype)
    rows, first_row, kept = shards.whole_tiles(x, tile.rows)
    search = partial(_search, shards, x, k=k)
    found = search(rows, kept, first_row, remedian(drawn), tile, measure_all=measure_all)

    def search_some(places: Tensor, centre: Tensor | None) -> Found:
        tile = tile_of(1, shards.total, width, k, torch.float64)
        everything, self_index = slice(len(places)), places + shards.own_rows.start
        return search(x[None, places], everything, self_index, centre, tile, measure_all=True)

    places = (found.undecided & finite_tokens(x[None])[0]).nonzero()[:, 0]
    centres = remedian(drawn.double()), None  # products in float64, then measured differences
    passes = [partial(search_some, centre=centre) for centre in centres]
    search_again(found.distances, found.indices, places, passes, shards.any)
    return found.distances, found.indices


def _search(
    shards: Shards,
    x: Tensor,
    rows: Tensor,
    kept: slice,
    self_index: int | Tensor,
    centre: Tensor | None,
    tile: Tile,
    k: int,
    measure_all: bool,
) -> Found:
    """One pass over rows (1, m, D) among the tokens of all ranks; the result is of the rows `kept`.

    Args:
        x: (n, D), this rank's tokens.
        kept: the rows to return. The others only fill up tiles.
        self_index, centre: as for `Candidates`.
    """
    others = shards.total - 1
    n_candidates, n_measured = list_sizes(k, others, measure_all)
    candidates = Candidates(rows, n_candidates, tile.rows, self_index, centre)
    for first, (piece,) in shards.pieces(tile.columns, x):
        candidates.add(piece, first)
    queries = rows[0, kept]
    measure = partial(_pair_distances, shards, x, queries, tile.columns)
    distances, indices = settle_last(candidates.indices[:, kept], k, n_measured, measure)
    is_open = torch.zeros(distances.shape[:2], dtype=torch.bool, device=x.device)
    if centre is not None:
        is_open = undecided_lists(
            candidates.squares()[:, kept],
            candidates.norms[:, kept],
            distances[..., -1],
            n_measured,
            x.shape[1],
            n_candidates == others,
        )
    n_distances = k if measure_all else 1
    return Found(distances[0, :, -n_distances:].contiguous(), indices[0].contiguous(), is_open[0])


def _pair_distances(
    shards: Shards, x: Tensor, queries: Tensor, step: int, neighbors: Tensor
) -> Tensor:
    """`pair_distances` (1, m, c) of queries (m, D) and neighbors (1, m, c) on any rank.

    x (n, D) are this rank's tokens. The pairs are sorted by the piece that holds their neighbour.
    Every step measures the same number of pairs, because a device may sum in another order for
    fewer.
    """
    columns, pairs = neighbors.flatten().sort()
    dtype = compute_dtype(x)
    distances = x.new_empty(neighbors.numel(), dtype=dtype)
    fitting = tiles.WORKSPACE_BYTES // 32 // (x.shape[1] * dtype.itemsize)
    pairs_per_step = max(1, min(PAIRS, fitting))
    first_rows = torch.arange(0, shards.total, step, device=x.device)
    bounds = [*torch.searchsorted(columns, first_rows).tolist(), neighbors.numel()]
    pieces = shards.pieces(step, x)
    for (first, (piece,)), (start, stop) in zip(pieces, pairwise(bounds), strict=True):
        finite = finite_tokens(piece)
        for position in range(start, stop, pairs_per_step):
            positions = torch.arange(position, position + pairs_per_step, device=x.device)
            positions = positions.clamp(max=stop - 1)
            pair = pairs[positions]
            rows = queries[pair // neighbors.shape[-1]]
            asked = (columns[positions] - first)[None, :, None]
            distances[pair] = pair_distances(piece, asked, rows[None], finite).flatten()
    return distances.view_as(neighbors)
