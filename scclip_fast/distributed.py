"""`knn`, `lof_scores` and `aggregate` over rows that the processes of a group share.

Each rank of a `torch.distributed` group passes its rows (n, D) and gets the results of these. The
rows of all ranks, one rank's after the other's, are the N tokens of one image, and indices count
through them. Shards may be uneven or empty. All ranks make the same call; arguments that do not fit
are an error on every rank, not a deadlock. With NCCL, rows are on the rank's current device.

Rows travel in pieces of at most 16 MiB, each broadcast by the ranks that hold it. A rank holds its
shard twice (`aggregate` once more, in the dtype of its sums), its neighbour lists, two pieces and
`chunked.WORKSPACE_BYTES`: never N x N and, beyond a few pieces, not N x D. Only single numbers a
token (k-distances, densities) go to everyone.

No bit of a result depends on how the rows are shared out: pieces and tiles of rows begin at
multiples of one step in the order of all rows, whoever holds them, so that each product has the
same shape and each row its place in it, and sums run over the pieces in order. On a CPU, `knn` and
`lof_scores` are also, bit for bit, what the ops of these names give on all rows in one process
(contiguous, `backend="torch"`); `aggregate` is so to rounding, as a product may depend on where in
memory its operands begin. All this between equal machines with as many threads each. It is tested
with Gloo on CPUs, not on GPUs.

The torch path runs on every device: the Triton kernels search one tensor among itself.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from . import chunked, reference
from .certificate import undecided
from .chunked import Tile
from .ops import _check
from .ops.outliers import check_variant
from .precision import true_float32
from .search import (
    Search,
    candidates,
    finite_tokens,
    pair_distances,
    remedian,
    sample,
    settle_last,
    tile_of,
)
from .shards import Shards, meet, rows_of

PAIRS = 4096  # are measured at once, if the workspace has room


@true_float32
def knn(x: Tensor, k: int, *, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest other tokens of every token of this rank; see `scclip_fast.knn`.

    Args:
        x: (n, D), this rank's rows; D, dtype and the kind of device are those of all ranks.
        k: 1 <= k < N.
        group: the ranks that share the rows; by default all.

    Returns:
        Squared distances (n, k), float32 (float64 for float64), ascending, and indices (n, k) into
        the rows of all ranks, int64; equal distances by lower index. Neither carries a gradient.
        Besides the collectives, the host waits for the device to learn how many candidates lie in
        which piece and how many rows are undecided.

    Raises:
        TypeError: x is no floating tensor or k no int.
        ValueError: wrong rank of x, k outside [1, N - 1], an error of another rank, ranks that
            disagree, no process group, or one that this process is not in.
    """
    shards, (x,) = meet(group, partial(rows_of, x=x), op="knn", k=k)
    k = _check.neighbor_count("k", k, shards.total)
    distances, indices = _nearest(shards, x, k, every_distance=True)
    return distances.masked_fill(distances.isnan(), torch.inf), indices


@true_float32
def lof_scores(
    features: Tensor,
    n_neighbors: int = 30,
    *,
    variant: str = "scclip",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Local Outlier Factor of every token of this rank; see `scclip_fast.lof_scores`.

    Args:
        features: (n, D); see `knn`.
        n_neighbors: k, 1 <= k < N.
        variant: "scclip" or "breunig".
        group: see `knn`.

    Returns:
        (n,), float32 (float64 for float64), without a gradient.

    Raises:
        TypeError, ValueError: as `knn`, and for an unknown variant.
    """
    shards, (x,) = meet(
        group,
        partial(rows_of, features=features),
        op="lof_scores",
        n_neighbors=n_neighbors,
        variant=variant,
    )
    check_variant(variant)
    k = _check.neighbor_count("n_neighbors", n_neighbors, shards.total)
    distances, neighbors = _nearest(shards, x, k, every_distance=variant == "breunig")
    k_distance, neighbors = shards.everyones(distances[:, -1]), neighbors[None]
    if variant == "scclip":
        return reference.simplified_lof(k_distance, neighbors, shards.own)[0]
    own = reference.reachability_density(distances[None].sqrt(), neighbors, k_distance.sqrt())
    scores = reference.density_ratio(shards.everyones(own[0]), neighbors, own)
    return torch.where(k_distance[:, shards.own].isnan(), torch.nan, scores)[0]


@true_float32
def aggregate(
    values: Tensor,
    features: Tensor,
    beta: float = 0.4,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Means of the tokens of all ranks for every token of this one; see `scclip_fast.aggregate`.

    Args:
        values: (n, Dv), this rank's rows.
        features: (n, D), those of the same tokens; the dtype may differ.
        beta: threshold on the cosine similarity.
        group: see `knn`.

    Returns:
        (n, Dv), of the dtype of `values`; sums are float32 at least.

    Raises:
        TypeError, ValueError: as `knn`; ValueError also where a gradient would be lost, as there is
            no backward pass.
    """
    check = partial(rows_of, differentiable=False, values=values, features=features)
    shards, (values, features) = meet(group, check, op="aggregate", beta=beta)
    beta = _check.number("beta", beta)
    dtype = chunked.compute_dtype(values, features)
    tile = chunked.plan(1, shards.total, values.shape[1] + features.shape[1], dtype)
    rows, _, own = shards.whole_tiles(features, tile.rows)
    parts = list(chunked.spans(rows.shape[1], tile.rows))
    unit = [rows[:, part].to(dtype) * chunked.inverse_norms(rows[:, part]) for part in parts]
    out = rows.new_zeros(1, rows.shape[1], values.shape[1], dtype=dtype)
    total = rows.new_zeros(1, rows.shape[1], dtype=dtype)
    floor = rows.new_full((1,), beta, dtype=dtype)
    for _, (keys, piece) in shards.pieces(tile.columns, features, values):
        scale = chunked.inverse_norms(keys)
        for part, queries in zip(parts, unit, strict=True):
            part_out, part_total = chunked.weighed(queries, keys, scale, piece, floor, None)
            out[:, part] += part_out
            total[:, part] += part_total
    out /= (total + reference.AGGREGATE_EPS).unsqueeze(-1)
    return out[0, own].to(values.dtype)


def _nearest(shards: Shards, x: Tensor, k: int, every_distance: bool) -> tuple[Tensor, Tensor]:
    """Squared distances (n, k) or (n, 1) and indices (n, k) of `search.nearest`.

    The passes are those of `search.py`. All ranks take part in each of them as long as one rank has
    an undecided row.
    """
    dtype = chunked.compute_dtype(x)
    drawn = shards.rows_at(sample(shards.total, x.device), x.to(dtype))
    tile = tile_of(1, shards.total, x.shape[1], k, dtype)
    rows, first_row, own = shards.whole_tiles(x, tile.rows)
    find = partial(_pass, shards, x, k=k)
    distances, indices, is_open = find(
        rows, own, first_row, centre=remedian(drawn), tile=tile, every_distance=every_distance
    )
    is_open &= finite_tokens(x[None])[0]
    for centre in (remedian(drawn.double()), None):
        left = is_open.nonzero()[:, 0]
        if not shards.any(len(left) > 0):
            break
        again, own = x[None, left], left + shards.own.start
        tile = tile_of(1, shards.total, x.shape[1], k, torch.float64)
        found = find(again, slice(len(left)), own, centre=centre, tile=tile, every_distance=True)
        distances[left], indices[left] = found[0][:, -distances.shape[1] :], found[1]
        is_open[left] = found[2]
    return distances, indices


def _pass(
    shards: Shards,
    x: Tensor,
    rows: Tensor,
    kept: slice,
    own: int | Tensor,
    k: int,
    centre: Tensor | None,
    tile: Tile,
    every_distance: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One search of the rows (1, m, D): distances, indices and which of `kept` stay undecided.

    Args:
        kept: the rows to return; the others only fill up tiles.
        own, centre: as for `search.Search`.
    """
    wanted, measured = candidates(k, shards.total - 1, every_distance)
    search = Search(rows, wanted, tile.rows, own, centre)
    for first, (piece,) in shards.pieces(tile.columns, x):
        search.see(piece, first)
    asking = rows[0, kept]
    measure = partial(_pair_distances, shards, x, asking, tile.columns)
    distances, indices = settle_last(search.indices[:, kept], k, measured, measure)
    is_open = torch.zeros(distances.shape[:2], dtype=torch.bool, device=x.device)
    if centre is not None:
        complete = wanted == shards.total - 1
        scores, norms = search.scores[:, kept], search.norms[:, kept]
        is_open = undecided(scores, norms, distances[..., -1], measured, x.shape[1], complete)
    last = k if every_distance else 1
    return distances[0, :, -last:].contiguous(), indices[0].contiguous(), is_open[0]


def _pair_distances(
    shards: Shards, x: Tensor, asking: Tensor, step: int, neighbors: Tensor
) -> Tensor:
    """`pair_distances` (1, m, c) of rows asking (m, D) and tokens of any rank, by index.

    x (n, D) are this rank's tokens. The pairs are sorted by the piece that they wait for, and
    measured as many at a time whatever their number, because a device may sum in another order for
    fewer.
    """
    columns, pair = neighbors.flatten().sort()
    dtype = chunked.compute_dtype(x)
    distances = x.new_empty(neighbors.numel(), dtype=dtype)
    fitting = chunked.WORKSPACE_BYTES // 32 // (x.shape[1] * dtype.itemsize)
    at_once = max(1, min(PAIRS, fitting))
    firsts = torch.arange(0, shards.total, step, device=x.device)
    bounds = [*torch.searchsorted(columns, firsts).tolist(), neighbors.numel()]
    pieces = shards.pieces(step, x)
    for (first, (piece,)), (start, stop) in zip(pieces, pairwise(bounds), strict=True):
        finite = finite_tokens(piece)
        for position in range(start, stop, at_once):
            some = torch.arange(position, position + at_once, device=x.device).clamp(max=stop - 1)
            rows = asking[pair[some] // neighbors.shape[-1]]
            asked = (columns[some] - first)[None, :, None]
            distances[pair[some]] = pair_distances(piece, asked, rows[None], finite).flatten()
    return distances.view_as(neighbors)
