"""A second look, in half precision, at the rows that the bins do not decide.

For each listed row, writes every column with c <= W into the table.

c of `bins.py` and the lists of `table.Undecided` -> table (B, R, 64) int32, whose entries are not
marked as sure. The bins of a listed row may have dropped a neighbour, but no neighbour has c > W. A
row with more than 64 such columns goes on the list of the search over measured distances, once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch
from .table import CAPACITY, Rounded, Undecided, append, shares_of, token_at


@triton.jit(do_not_specialize=["first", "N", "programs"])
def _collect_kernel(
    # tensors
    row_y_ptr,
    col_y_ptr,
    row_a2_ptr,
    col_a2_ptr,
    positions_ptr,
    n_positions_ptr,
    W_ptr,
    n_candidates_ptr,
    tokens_ptr,
    n_tokens_ptr,
    table_ptr,
    # sizes
    first,
    rows_per_image,
    N,
    padded_m,
    padded_n,
    padded_d,
    programs,
    EXCLUDE_SELF: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    image = (pid // programs).to(tl.int64)
    count = tl.load(n_positions_ptr + image)
    shares = shares_of(count, BLOCK_M, programs, programs)
    block, share = pid % programs // shares, pid % programs % shares
    if block * BLOCK_M >= count:
        return
    slot = block * BLOCK_M + tl.arange(0, BLOCK_M)
    item = image * rows_per_image + slot
    listed = slot < count
    position = tl.load(positions_ptr + item, mask=listed, other=first)
    # Rounding makes some c negative. Only -inf is below all of them, so that slots beyond the list
    # match no column.
    W = tl.load(W_ptr + item, mask=listed, other=-float("inf"))
    row_y_ptr += image * padded_m * padded_d
    col_y_ptr += image * padded_n * padded_d
    col_a2_ptr += image * padded_n
    row_a2 = tl.load(row_a2_ptr + image * padded_m + position)
    row_ptrs = row_y_ptr + position.to(tl.int64)[:, None] * padded_d
    table_ptr += (image * rows_per_image + position - first)[:, None] * CAPACITY
    dims = tl.arange(0, BLOCK_D)
    for start in range(share * BLOCK_N, padded_n, shares * BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_ptrs = col_y_ptr + cols.to(tl.int64)[None, :] * padded_d
        dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in range(0, padded_d, BLOCK_D):
            left = tl.load(row_ptrs + (d + dims)[None, :])  # [BLOCK_M, BLOCK_D]
            dot = tl.dot(left, tl.load(col_ptrs + (d + dims)[:, None]), dot)
        c = (row_a2[:, None] + tl.load(col_a2_ptr + cols)[None, :]) - 2.0 * dot
        token = token_at(cols)
        near = (c <= W[:, None]) & (token < N)[None, :] & listed[:, None]
        if EXCLUDE_SELF:
            near = near & (position[:, None] != cols[None, :])
        n_near = tl.sum(near.to(tl.int32), axis=1)
        # The tiles come in any order: `settle` ranks by distance and column.
        before = tl.atomic_add(n_candidates_ptr + item, n_near, mask=n_near > 0)
        place = before[:, None] + tl.cumsum(near.to(tl.int32), axis=1) - 1
        entry = token[None, :] + position[:, None] * 0
        tl.store(table_ptr + place, entry, mask=near & (place < CAPACITY))
        # At most one tile of a row passes the capacity, so that the row is listed once.
        passes = (n_near > 0) & (before <= CAPACITY) & (before + n_near > CAPACITY)
        row_token = token_at(position)
        append(tokens_ptr + image * rows_per_image, n_tokens_ptr + image, row_token, passes)


def collect_launch(
    rows: Rounded,
    columns: Rounded,
    exclude_self: bool,
    undecided: Undecided,
    table: torch.Tensor,
    first: int,
    programs: int,
) -> Launch:
    """Writes the columns with c <= W of the listed rows into the table of `certify.py`.

    programs: an image's, which share the blocks of its list and their columns.
    """
    padded_d = columns.padded_d
    return Launch(
        _collect_kernel,
        len(table) * programs,
        row_y_ptr=rows.y,
        col_y_ptr=columns.y,
        row_a2_ptr=rows.a2,
        col_a2_ptr=columns.a2,
        **undecided.pointers(),
        table_ptr=table,
        first=first,
        rows_per_image=table.shape[1],
        N=columns.n,
        padded_m=rows.padded_n,
        padded_n=columns.padded_n,
        padded_d=padded_d,
        programs=programs,
        EXCLUDE_SELF=exclude_self,
        BLOCK_M=64,
        BLOCK_N=64,
        BLOCK_D=128 if padded_d % 128 == 0 else 64,
        num_warps=8,
        num_stages=3,
    )
