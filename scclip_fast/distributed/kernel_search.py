"""The search of `kernels/knn.py` for the rows of this rank among the rows of all ranks.

Each piece that arrives is a bank, and the rank's rows are queries. The kernels return the exact
nearest columns of each row in the piece, with measured distances, and the lists of all pieces are
merged by (distance, index). Queries leave out nothing, so k + 1 columns are kept and each row is
removed from its own list at the end.

The kernels plan their launches by the number of rows, and a row without a certificate is measured
by another kernel, which sums in another order. So pieces begin at multiples of one step, and rows
are searched in whole tiles: each launch has the same shapes, and each row its place in them,
whatever the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunked.topk import smallest
from .shards import Shards

#: A row's candidates are certified and measured once a piece, so that pieces are large. Few
#: channels are padded to 64, which the number of columns bounds.
PIECE_BYTES, COLUMNS = 64 * 2**20, 65_536
#: Rows of one search. With three shares of the columns, 88 blocks fill 132 multiprocessors twice.
ROWS = 88 * 128


def nearest_by_kernels(shards: Shards, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances (n, k) float32 and indices (n, k), as `search.nearest` returns them.

    Args:
        x: (n, D) float16, bfloat16 or float32, this rank's rows.
        k: 1 <= k < N, and k + 1 at most what the kernels take.
    """
    from ..kernels.knn import nearest_triton

    rows, _, kept = shards.whole_tiles(x, ROWS)
    tiles = rows.split(ROWS, dim=1)
    # Lists of no neighbours yet, in the dtypes of distances and indices.
    lists = [(tile[..., :0].float(), tile[..., :0].long()) for tile in tiles]
    step = min(COLUMNS, max(1, PIECE_BYTES // (x.shape[1] * x.itemsize)))
    for first, (piece,) in shards.pieces(step, x):
        n_found = min(k + 1, piece.shape[1])
        for turn, tile in enumerate(tiles):
            distances, columns = nearest_triton(piece, n_found, True, tile)
            lists[turn] = _merged(lists[turn], (distances, columns + first), k + 1)
    distances, indices = (torch.cat(parts, dim=1)[0, kept] for parts in zip(*lists, strict=True))
    own = torch.arange(shards.own_rows.start, shards.own_rows.stop, device=x.device)
    return _without(own, distances, indices)


def _merged(
    nearest: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], n: int
) -> tuple[Tensor, Tensor]:
    """The n nearest of two lists (1, m, c) of distances and indices, each in order.

    All indices of the second list are higher than those of the first.
    """
    distances, indices = (torch.cat(both, dim=-1) for both in zip(nearest, found, strict=True))
    distances, order = smallest(distances, min(n, distances.shape[-1]))
    return distances, indices.gather(-1, order)


def _without(own: Tensor, distances: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The lists (n, k + 1) less the entry of the row's own index (n,), or less the last one.

    More than k equal tokens, and a row that is not finite, may have no room for the row itself.
    """
    is_own = indices == own.unsqueeze(-1)
    is_own[:, -1] |= ~is_own.any(dim=-1)
    place = is_own.byte().argmax(dim=-1, keepdim=True)
    others = torch.arange(indices.shape[-1] - 1, device=own.device).expand(len(own), -1)
    others = others + (others >= place)
    return distances.gather(-1, others), indices.gather(-1, others)
