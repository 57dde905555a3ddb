"""`knn`, `lof_scores` and `aggregate` over rows that the processes of a group share.

Each rank of a `torch.distributed` group passes its rows (n, D) and gets the results of these. The
rows of all ranks, one rank's after the other's, are the N tokens of one image, and indices count
through them. Shards may be uneven or empty. All ranks make the same call. Arguments that do not fit
raise an error on every rank instead of a deadlock. With NCCL, rows are on the rank's current
device.

The backend of a search is that of the op, and must be the same on all ranks. On GPUs the kernels
search each piece of rows that arrives (`kernel_search.py`). The torch path runs on CPUs, and on
GPUs for float64 and for k above 127. `aggregate` always runs the torch path.

Rows travel in pieces of at most 32 MiB, or 64 MiB for the kernels, each broadcast by the ranks that
hold it. A rank holds its shard twice (`aggregate` once more, in the dtype of its sums), its
neighbour lists, a few pieces and `chunked.tiles.WORKSPACE_BYTES`, or for the kernels about twice
this: never N x N and, beyond these pieces, not N x D. Only single numbers a token (k-distances,
densities) go to every rank.

No bit of a result depends on how the rows are shared out. Pieces and tiles of rows begin at
multiples of one step in the order of all rows, whichever rank holds them, so that each product has
the same shape and each row its place in it, and sums run over the pieces in order. Each result
equals that of the op of its name on all rows in one process, up to rounding: on a CPU the op makes
each product of two tokens once, and a product may depend on where in memory its operands begin; the
kernels may measure a row in one piece by another kernel than in all rows. All of this holds between
equal machines with as many threads each. It is tested with Gloo on CPUs, the kernels in Triton's
interpreter, and not on GPUs.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..chunked.aggregate import inverse_norms, weighted_sums
from ..chunked.tiles import compute_dtype, plan, spans
from ..ops import _check
from ..ops.lof import check_variant
from ..precision import true_float32
from .search import nearest
from .shards import meet, rows_of


@true_float32
def knn(x: Tensor, k: int, *, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest other tokens of every token of this rank; see `scclip_fast.knn`.

    Args:
        x: (n, D), this rank's rows. All ranks have the same D, dtype and kind of device.
        k: 1 <= k < N.
        group: the ranks that share the rows; by default all.

    Returns:
        Squared distances (n, k), float32 (float64 for float64), ascending, and indices (n, k) into
        the rows of all ranks, int64. Equal distances come by lower index. Neither carries a
        gradient. Besides the collectives, the host waits for the device on the torch path alone, to
        learn how many candidates lie in which piece and how many rows are undecided.

    Raises:
        TypeError: x is no floating tensor or k no int.
        ValueError: wrong rank of x, k outside [1, N - 1], a backend that cannot run, an error of
            another rank, ranks that disagree, on the backend too, no process group, or one that
            this process is not in.
    """
    shards, (x,) = meet(group, partial(rows_of, x=x), op="knn", k=k)
    k = _check.neighbor_count("k", k, shards.total)
    distances, indices = nearest(shards, x, k, measure_all=True)
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
    distances, neighbors = nearest(shards, x, k, measure_all=variant == "breunig")
    k_distance, neighbors = shards.all_rows(distances[:, -1]), neighbors[None]
    if variant == "scclip":
        return reference.simplified_lof(k_distance, neighbors, shards.own_rows)[0]
    density = reference.reachability_density(distances[None].sqrt(), neighbors, k_distance.sqrt())
    scores = reference.density_ratio(shards.all_rows(density[0]), neighbors, density)
    return torch.where(k_distance[:, shards.own_rows].isnan(), torch.nan, scores)[0]


@true_float32
def aggregate(
    values: Tensor,
    features: Tensor,
    beta: float = 0.4,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Means over the tokens of all ranks for every token of this rank; see `scclip_fast.aggregate`.

    Args:
        values: (n, Dv), this rank's rows.
        features: (n, D) of the same tokens; the dtype may differ.
        beta: threshold on the cosine similarity.
        group: see `knn`.

    Returns:
        (n, Dv), of the dtype of `values`; sums are float32 at least.

    Raises:
        TypeError, ValueError: as `knn`, and ValueError if a tensor requires a gradient, as there is
            no backward pass.
    """
    check = partial(rows_of, differentiable=False, values=values, features=features)
    shards, (values, features) = meet(group, check, op="aggregate", beta=beta)
    beta = _check.number("beta", beta)
    dtype = compute_dtype(values, features)
    tile = plan(1, shards.total, values.shape[1] + features.shape[1], dtype)
    rows, _, kept = shards.whole_tiles(features, tile.rows)
    row_spans = list(spans(rows.shape[1], tile.rows))
    unit = [rows[:, span].to(dtype) * inverse_norms(rows[:, span]) for span in row_spans]
    out = rows.new_zeros(1, rows.shape[1], values.shape[1], dtype=dtype)
    total = rows.new_zeros(1, rows.shape[1], dtype=dtype)
    floor = rows.new_full((1,), beta, dtype=dtype)
    for _, (keys, key_values) in shards.pieces(tile.columns, features, values):
        scale = inverse_norms(keys)
        for span, queries in zip(row_spans, unit, strict=True):
            value_sum, weight_sum = weighted_sums(queries, keys, scale, key_values, floor, None)
            out[:, span] += value_sum
            total[:, span] += weight_sum
    out /= (total + reference.AGGREGATE_EPS).unsqueeze(-1)
    return out[0, kept].to(values.dtype)
