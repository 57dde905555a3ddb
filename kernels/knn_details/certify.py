"""The certificate: which columns surely hold the k nearest neighbours of each row.

keys of `bins.py`, the rows' a^2 and r and the columns' u of `rounding.py`
-> table (B, R, 64) int32 of the columns that may be neighbours, those to be measured first. A row
that the bins do not decide has an empty table and is in one of two lists (`table.Undecided`): with
its bound W, for `collect`, or without a bound, for the search over measured distances.

The derivation is in README.md beside this file; its letters are the names in `_certify_kernel`:

    e  = r + u a + eta               g(h) = 2 gamma a (a + h)
    k columns have h <= t_most       all columns but k - 1 have h >= t_least
    V  = (U + e) / (1 - u)           U = t_most (1 + u) + e, at least the k-th true distance
    W  = V^2 + g(V)                  every neighbour has c <= W
    S  = (L - e) / (1 + u)           L = t_least (1 - u) - e, at most the k-th true distance
    S2 = S^2 - g(S)                  every column with c < S2 is a neighbour

If no bin is full below W, all neighbours are among the columns with c <= W, at most 64 as a rule;
only columns that are not sure need to be measured. Otherwise `collect` needs W, which holds for any
k columns. Data that suit fp16 badly make rows undecided, never wrong.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch
from .bins import DEPTH, tile_bits
from .rounding import eta
from .table import (
    CAPACITY,
    LARGEST_FLOAT,
    NO_COLUMN,
    NO_KEY,
    ROWS,
    SURE,
    TILE,
    Rounded,
    Undecided,
    append,
    token_at,
)

INFINITE_KEY: tl.constexpr = tl.constexpr(0x7F800000)
SLACK: tl.constexpr = tl.constexpr(1 + 2**-17)  # rounding of the norms and of these bounds


@triton.jit
def _kth_smallest(keys, K, bits):
    """Returns the k-th smallest key of each row, its lowest bits zero."""
    kth = tl.zeros([keys.shape[0]], tl.int32)
    for step in range(0, 31 - bits):
        trial = kth | (1 << (30 - step))
        fewer = tl.sum((keys < trial[:, None]).to(tl.int32), axis=1) < K
        kth = tl.where(fewer, trial, kth)
    return kth


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
    kth_key = _kth_smallest(tl.maximum(keys, 0), K, tile_bits)
    tile_mask = (1 << tile_bits) - 1
    finite_key = tl.minimum(kth_key, INFINITE_KEY - 1)
    tau_most = (finite_key | tile_mask).to(tl.float32, bitcast=True)
    tau_least = (finite_key & ~tile_mask).to(tl.float32, bitcast=True)

    # The bounds.
    a = tl.sqrt(tl.load(row_a2_ptr + image * padded_m + position))
    u = tl.load(col_u_ptr + image)
    e = tl.load(row_r_ptr + image * padded_m + position) + u * a + eta
    gamma_a = gamma * a
    t_most = (gamma_a + tl.sqrt(tau_most + 2.0 * gamma_a * a + gamma_a * gamma_a)) * SLACK
    t_least = tl.sqrt(tl.maximum(tau_least / SLACK - 2.0 * gamma_a * a, 0.0)) - gamma_a
    t_least = t_least / SLACK
    V = (t_most * (1.0 + u) + 2.0 * e) / (1.0 - u) * SLACK
    W = (V * V + 2.0 * gamma_a * (a + V)) * SLACK
    S = (t_least * (1.0 - u) - 2.0 * e) / (1.0 + u) / SLACK
    S2 = S * S / SLACK - 2.0 * gamma_a * (a + S)
    # From u = 1/2 on, half precision bounds no row of the image. A row that is not finite has no
    # bound either.
    W = tl.where(u < 0.5, W, float("inf"))
    bounded = (kth_key < INFINITE_KEY) & (W <= LARGEST_FLOAT)
    # The low bits of a key number its tile, so that the key of a c <= W may exceed the bits of W.
    W_key = tl.where(bounded, W, 0.0).to(tl.int32, bitcast=True) | tile_mask
    S2_key = tl.where((S > 0.0) & (S2 > 0.0), S2, 0.0).to(tl.int32, bitcast=True)

    # The selection.
    candidate = keys <= W_key[:, None]
    n_candidates = tl.sum(candidate.to(tl.int32), axis=1)
    full = candidate & (place // TILE % DEPTH == DEPTH - 1)  # its bin may have dropped a fourth
    complete = (n_candidates <= CAPACITY) & (tl.sum(full.to(tl.int32), axis=1) == 0)
    decided = bounded & complete & has_token
    tile = (place // (DEPTH * TILE)) * tiles + (keys & tile_mask)
    column = token_at(tile * TILE + place % TILE)
    sure = candidate & ((keys | tile_mask) < S2_key[:, None]) & (S2_key > 0)[:, None]
    measured = (candidate & (sure == 0)).to(tl.int32)

    # The store: columns to be measured, sure columns, empty entries; and the lists.
    measured_slot = tl.cumsum(measured, axis=1) - 1
    sure_slot = tl.sum(measured, axis=1)[:, None] + tl.cumsum(sure.to(tl.int32), axis=1) - 1
    out = table_ptr + row[:, None] * CAPACITY
    entry = tl.where(sure, column | SURE, column)
    slot = tl.where(sure, sure_slot, measured_slot)
    tl.store(out + slot, entry, mask=candidate & decided[:, None])
    slots = tl.arange(0, CAPACITY)[None, :]
    empty = tl.zeros([BLOCK_R, CAPACITY], tl.int32) + NO_COLUMN
    tl.store(out + slots, empty, mask=(slots >= n_candidates[:, None]) | (decided == 0)[:, None])
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


def gamma(d: int) -> float:
    """Returns a bound on the rounding of a sum of d products, as a share of the norms' product.

    Tensor cores add 16 products at a time to the sum and truncate each to the largest of them: 17
    units of 2^-23 a step.
    """
    return (1.1 * d + 64) * 2.0**-23
