"""The certificate of a half-precision pass: which columns hold the k nearest neighbours for sure.

bins of `candidates.py`, a^2 and e (B, padded N), u (B,) float32
-> table (B, rows, 64) int32 of columns that hold the k nearest others of each row, or the row in a
list of those that this pass cannot decide.

In the scaled units, d is the true distance, h = ||y_i - y_j||, and r_j <= u a_j + eta for all j.
With a_j <= a_i + h and e_i = r_i + u a_i + eta,

    |d - h| <= r_i + r_j <= e + u h          |c - h^2| <= g(h) = 2 gamma a_i (a_i + h)

where gamma bounds how the products' sum is rounded. Let t bound h from above where c is at most the
k-th smallest c, and l from below where c is not among the k - 1 smallest. Then

    L = l (1 - u) - e  <=  the k-th true distance  <=  t (1 + u) + e = U
    a neighbour has d <= U, so h <= (U + e) / (1 - u) = V, so c <= V^2 + g(V) = W
    c <= S^2 - g(S) with S = (L - e) / (1 + u) gives d <= L: surely one of the k

If no bin is full below W, all neighbours are among the columns with c <= W, at most 64 as a rule;
only those that are not sure need to be measured. Data that suit fp16 badly make rows undecided,
never wrong.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch
from .candidates import BLOCK_N, DEPTH, FARTHEST, NO_KEY, tile_mask

CAPACITY = 64  # columns a row of the table
SURE: tl.constexpr = tl.constexpr(1 << 30)  # flags a column that need not be measured
NO_COLUMN: tl.constexpr = tl.constexpr(-1)
INFINITE_KEY: tl.constexpr = tl.constexpr(0x7F800000)
SLACK: tl.constexpr = tl.constexpr(1 + 2**-17)  # rounding of the norms and of these bounds


@triton.jit
def _certify_kernel(
    # tensors
    bins_ptr,
    square_ptr,
    bound_ptr,
    ratio_ptr,
    table_ptr,
    listed_ptr,
    count_ptr,
    # sizes
    first,
    rows_per_image,
    N,
    padded_n,
    tiles,
    K,
    gamma,
    SPLITS: tl.constexpr,
    TILE_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    KEYS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = rows_per_image // BLOCK_R
    image = (pid // blocks).to(tl.int64)
    local = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = first + local
    position = tl.arange(0, KEYS)[None, :]
    width: tl.constexpr = 3 * BLOCK_N * SPLITS
    entry_row = image * rows_per_image + local
    keys = tl.load(
        bins_ptr + entry_row[:, None] * width + position, mask=position < width, other=NO_KEY
    )  # [BLOCK_R, KEYS]

    order = tl.maximum(keys, 0)
    kth = tl.zeros([BLOCK_R], tl.int32)
    for bit in range(0, 31):  # the largest number that fewer than K keys are below
        trial = kth | (1 << (30 - bit))
        fewer = tl.sum((order < trial[:, None]).to(tl.int32), axis=1) < K
        kth = tl.where(fewer, trial, kth)
    held = tl.minimum(kth, INFINITE_KEY - 1)
    at_most = (held | TILE_MASK).to(tl.float32, bitcast=True)
    at_least = (held & ~TILE_MASK).to(tl.float32, bitcast=True)

    a = tl.sqrt(tl.load(square_ptr + image * padded_n + row))
    e = tl.load(bound_ptr + image * padded_n + row)
    u = tl.load(ratio_ptr + image)
    gamma_a = gamma * a
    t = (gamma_a + tl.sqrt(at_most + 2.0 * gamma_a * a + gamma_a * gamma_a)) * SLACK
    below = (tl.sqrt(tl.maximum(at_least / SLACK - 2.0 * gamma_a * a, 0.0)) - gamma_a) / SLACK
    v = (t * (1.0 + u) + 2.0 * e) / (1.0 - u) * SLACK
    limit = (v * v + 2.0 * gamma_a * (a + v)) * SLACK  # W
    s = (below * (1.0 - u) - 2.0 * e) / (1.0 + u) / SLACK
    sure_limit = s * s / SLACK - 2.0 * gamma_a * (a + s)
    # u >= 1/2: half precision says nothing of this image. Not finite: nor of this row.
    limit = tl.where(u < 0.5, limit, float("inf"))
    decided = (kth < INFINITE_KEY) & (limit <= FARTHEST)
    limit_key = tl.where(decided, limit, 0.0).to(tl.int32, bitcast=True)
    sure_key = tl.where((s > 0.0) & (sure_limit > 0.0), sure_limit, 0.0).to(tl.int32, bitcast=True)

    candidate = keys <= limit_key[:, None]
    candidates = tl.sum(candidate.to(tl.int32), axis=1)
    full = candidate & (position // BLOCK_N % 3 == 2)  # who came fourth to this bin is not known
    decided = decided & (candidates <= CAPACITY) & (tl.sum(full.to(tl.int32), axis=1) == 0)
    exists = row < N

    tile = (position // (3 * BLOCK_N)) * tiles + (keys & TILE_MASK)
    column = tile * BLOCK_N + position % BLOCK_N
    sure = ((keys | TILE_MASK) < sure_key[:, None]) & (sure_key > 0)[:, None]
    slot = tl.cumsum(candidate.to(tl.int32), axis=1) - 1
    out = table_ptr + entry_row[:, None] * CAPACITY
    written = candidate & (decided & exists)[:, None]
    tl.store(out + slot, tl.where(sure, column | SURE, column), mask=written)
    slots = tl.arange(0, CAPACITY)[None, :]
    rest = tl.zeros([BLOCK_R, CAPACITY], tl.int32) + NO_COLUMN
    tl.store(out + slots, rest, mask=slots >= candidates[:, None])
    undecided = exists & (decided == 0)
    place = tl.atomic_add(count_ptr + image + local * 0, 1, mask=undecided)
    tl.store(listed_ptr + image * rows_per_image + place, row, mask=undecided)


def certify_launch(
    bins: torch.Tensor,
    square: torch.Tensor,
    bound: torch.Tensor,
    ratio: torch.Tensor,
    table: torch.Tensor,
    listed: torch.Tensor,
    count: torch.Tensor,
    first: int,
    n: int,
    k: int,
    gamma: float,
) -> Launch:
    """bound and ratio are e and u; listed (B, rows) int32, count (B,) int32, zeros."""
    batch, rows, splits = bins.shape[:3]
    padded_n = square.shape[1]
    assert table.shape == (batch, rows, CAPACITY) and table.is_contiguous() and k <= CAPACITY
    tiles = padded_n // BLOCK_N // splits
    keys = triton.next_power_of_2(DEPTH * BLOCK_N * splits)
    block_r = max(1, min(8, 4096 // keys))
    return Launch(
        _certify_kernel,
        batch * (rows // block_r),
        dict(bins_ptr=bins, square_ptr=square, bound_ptr=bound, ratio_ptr=ratio)
        | dict(table_ptr=table, listed_ptr=listed, count_ptr=count)
        | dict(first=first, rows_per_image=rows, N=n, padded_n=padded_n, tiles=tiles, K=k)
        | dict(gamma=gamma),
        dict(SPLITS=splits, TILE_MASK=tile_mask(tiles), BLOCK_N=BLOCK_N)
        | dict(BLOCK_R=block_r, KEYS=keys, CAPACITY=CAPACITY),
        dict(num_warps=4),
    )
