"""A second look, in half precision, at the rows that the bins do not decide.

For each listed row, writes every column with c <= W into the table.

c of `candidates.py` and the lists of `certify.py` -> table (B, rows, 64) int32. The bins of a
listed row may have lost a neighbour, but bound the c of its neighbours by W. Rows with more than 64
columns up to W go on the list of the search over measured distances (`knn.py`), each once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch
from .candidates import CAPACITY, append, share
from .rounding import token_at


@triton.jit(do_not_specialize=["first", "N", "programs"])
def _collect_kernel(
    # tensors
    half_ptr,
    square_ptr,
    listed_ptr,
    count_ptr,
    limit_ptr,
    found_ptr,
    rest_ptr,
    rest_count_ptr,
    table_ptr,
    # sizes
    first,
    rows_per_image,
    N,
    padded_n,
    padded_d,
    programs,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    image = (pid // programs).to(tl.int64)
    count = tl.load(count_ptr + image)
    splits = share(count, BLOCK_M, programs, programs)
    block, split = pid % programs // splits, pid % programs % splits
    if block * BLOCK_M >= count:
        return
    slot = block * BLOCK_M + tl.arange(0, BLOCK_M)
    item = image * rows_per_image + slot
    exists = slot < count
    rows = tl.load(listed_ptr + item, mask=exists, other=first)
    # Rounding makes some c negative: nothing but -inf is below all of them.
    limit = tl.load(limit_ptr + item, mask=exists, other=-float("inf"))
    half_ptr += image * padded_n * padded_d
    square_ptr += image * padded_n
    row_square = tl.load(square_ptr + rows)
    row_ptrs = half_ptr + rows.to(tl.int64)[:, None] * padded_d
    table_ptr += (image * rows_per_image + rows - first)[:, None] * CAPACITY
    dims = tl.arange(0, BLOCK_D)
    for start in range(split * BLOCK_N, padded_n, splits * BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_ptrs = half_ptr + cols.to(tl.int64)[None, :] * padded_d
        dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in range(0, padded_d, BLOCK_D):
            left = tl.load(row_ptrs + (d + dims)[None, :])  # [BLOCK_M, BLOCK_D]
            dot = tl.dot(left, tl.load(col_ptrs + (d + dims)[:, None]), dot)
        c = (row_square[:, None] + tl.load(square_ptr + cols)[None, :]) - 2.0 * dot
        token = token_at(cols)
        near = (c <= limit[:, None]) & (rows[:, None] != cols[None, :])
        near = near & (token < N)[None, :] & exists[:, None]
        here = tl.sum(near.to(tl.int32), axis=1)
        # In any order of the tiles: `settle` ranks by distance and column.
        before = tl.atomic_add(found_ptr + item, here, mask=here > 0)
        place = before[:, None] + tl.cumsum(near.to(tl.int32), axis=1) - 1
        entry = token[None, :] + rows[:, None] * 0
        tl.store(table_ptr + place, entry, mask=near & (place < CAPACITY))
        # True of one tile of a row at most.
        passes = (here > 0) & (before <= CAPACITY) & (before + here > CAPACITY)
        append(rest_ptr + image * rows_per_image, rest_count_ptr + image, token_at(rows), passes)


def collect_launch(
    half: torch.Tensor,
    square: torch.Tensor,
    undecided: tuple[torch.Tensor, ...],
    table: torch.Tensor,
    first: int,
    n: int,
    programs: int,
) -> Launch:
    """Writes the columns with c <= W of the listed rows into the table; see `certify.py`."""
    batch, padded_n, padded_d = half.shape
    listed, count, limit, found, rest, rest_count = undecided
    return Launch(
        _collect_kernel,
        batch * programs,
        dict(half_ptr=half, square_ptr=square, listed_ptr=listed, count_ptr=count)
        | dict(limit_ptr=limit, found_ptr=found, rest_ptr=rest, rest_count_ptr=rest_count)
        | dict(table_ptr=table, first=first)
        | dict(rows_per_image=table.shape[1], N=n, padded_n=padded_n, padded_d=padded_d)
        | dict(programs=programs),
        dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=128 if padded_d % 128 == 0 else 64),
        dict(num_warps=8, num_stages=3),
    )
