"""The certificate: which columns surely hold the k nearest neighbours of each row.

keys of `bins.py`, the rows' a^2 and r and the columns' u of `rounding.py`
-> table (B, R, 64) int32 of the columns that may be neighbours, those to be measured first. A row
that the bins do not decide has an empty table and is in one of two lists (`table.Undecided`): with
its bound W, for `collect`, or without a bound, for the search over measured distances.

Every neighbour has c <= W, and every column with c < S2 is one (`certificate.py`). If no bin is
full below W, all neighbours are among the columns with c <= W, at most 64 as a rule; only columns
that are not sure need to be measured. Otherwise `collect` needs W, which holds for any k columns.
Data that suit fp16 badly make rows undecided, never wrong.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch
from .bins import DEPTH, tile_bits
from .certificate import errors_of, gamma, kth_smallest, most_c, sure_c
from .rounding import eta
from .table import (
    CAPACITY,
    LARGEST_FLOAT,
    NO_KEY,
    ROWS,
    TILE,
    Rounded,
    Undecided,
    append,
    store_entries,
    token_at,
)

INFINITE_KEY: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit(do_not_specialize=["first", "M", "shares", "tiles", "tile_bits", "K"])
def _certify_kernel(
    # tensors
    bins_ptr,
    row_a2_ptr,
    row_r_ptr,
    col_u_ptr,
    table_ptr,
    positions_ptr,
    n_positions_ptr,
    W_ptr,
    n_candidates_ptr,
    tokens_ptr,
    n_tokens_ptr,
    # sizes
    first,
    rows_per_image,
    M,
    padded_m,
    shares,
    tiles,
    tile_bits,
    K,
    gamma,
    eta,
    # tile
    BLOCK_R: tl.constexpr,
    KEYS: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = rows_per_image // BLOCK_R
    image = (pid // blocks).to(tl.int64)
    local = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    position = first + local
    has_token = token_at(position) < M
    row = image * rows_per_image + local

    # The k-th key, up to the bits that number its tile: no bound depends on these.
    place = tl.arange(0, KEYS)[None, :]
    width = shares * (DEPTH * TILE)
    keys = tl.load(
        bins_ptr + row[:, None] * width + place, mask=place < width, other=NO_KEY
    )  # [BLOCK_R, KEYS]
    kth_key = kth_smallest(tl.maximum(keys, 0), K, tile_bits)
    tile_mask = (1 << tile_bits) - 1
    finite_key = tl.minimum(kth_key, INFINITE_KEY - 1)
    tau_most = (finite_key | tile_mask).to(tl.float32, bitcast=True)
    tau_least = (finite_key & ~tile_mask).to(tl.float32, bitcast=True)

    # The bounds. A row that is not finite has none.
    rows = image * padded_m + position
    a, e, u = errors_of(row_a2_ptr + rows, row_r_ptr + rows, col_u_ptr + image, eta)
    W = most_c(tau_most, a, e, u, gamma)
    bounded = (kth_key < INFINITE_KEY) & (W <= LARGEST_FLOAT)
    # The low bits of a key number its tile, so that the key of a c <= W may exceed the bits of W.
    W_key = tl.where(bounded, W, 0.0).to(tl.int32, bitcast=True) | tile_mask
    S2_key = sure_c(tau_least, a, e, u, gamma).to(tl.int32, bitcast=True)

    # The selection.
    candidate = keys <= W_key[:, None]
    n_candidates = tl.sum(candidate.to(tl.int32), axis=1)
    full = candidate & (place // TILE % DEPTH == DEPTH - 1)  # its bin may have dropped a fourth
    complete = (n_candidates <= CAPACITY) & (tl.sum(full.to(tl.int32), axis=1) == 0)
    decided = bounded & complete & has_token
    tile = (place // (DEPTH * TILE)) * tiles + (keys & tile_mask)
    column = token_at(tile * TILE + place % TILE)
    sure = candidate & ((keys | tile_mask) < S2_key[:, None]) & (S2_key > 0)[:, None]
    store_entries(table_ptr + row[:, None] * CAPACITY, column, candidate, sure, decided)

    # The lists.
    undecided = has_token & (decided == 0)
    listed = undecided & bounded
    lists = image * rows_per_image
    item = append(positions_ptr + lists, n_positions_ptr + image, position, listed)
    tl.store(W_ptr + lists + item, W, mask=listed)
    tl.store(n_candidates_ptr + lists + item, 0, mask=listed)
    append(tokens_ptr + lists, n_tokens_ptr + image, token_at(position), undecided & (bounded == 0))


def certify_launch(
    bins: torch.Tensor,
    rows: Rounded,
    columns: Rounded,
    table: torch.Tensor,
    undecided: Undecided,
    first: int,
    k: int,
) -> Launch:
    """Fills the table and the lists of one pass. The two counts of `undecided` must be zeros."""
    batch, rows_per_image, shares = bins.shape[:3]
    share = columns.padded_n // shares
    assert table.shape == (batch, rows_per_image, CAPACITY.value) and table.is_contiguous()
    keys = triton.next_power_of_2(DEPTH.value * TILE.value * shares)
    return Launch(
        _certify_kernel,
        batch * (rows_per_image // ROWS),
        bins_ptr=bins,
        row_a2_ptr=rows.a2,
        row_r_ptr=rows.r,
        col_u_ptr=columns.u,
        table_ptr=table,
        **undecided.pointers(),
        first=first,
        rows_per_image=rows_per_image,
        M=rows.n,
        padded_m=rows.padded_n,
        shares=shares,
        tiles=share // TILE.value,
        tile_bits=tile_bits(share),
        K=k,
        gamma=gamma(columns.d),
        eta=eta(columns.d),
        BLOCK_R=ROWS,
        KEYS=keys,
        num_warps=max(1, keys // 1024),  # more than 1024 keys a warp spill
    )
