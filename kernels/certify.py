"""The certificate of a half-precision pass: which columns hold the k nearest neighbours for sure.

bins of `candidates.py`, a^2 and r (B, padded N), u (B,) float32
-> table (B, rows, 64) int32 of columns that hold the k nearest others of each row, those to be
measured first. Rows that the bins do not decide have an empty table and are in one of two lists:
with the bound W, for `collect`; without a bound, for the search over measured distances (`knn.py`).

In the scaled units, d is the true distance, h = ||y_i - y_j||, and r_j <= u a_j + eta for all j.
With a_j <= a_i + h and e_i = r_i + u a_i + eta,

    |d - h| <= r_i + r_j <= e + u h          |c - h^2| <= g(h) = 2 gamma a_i (a_i + h)

where gamma bounds how the products' sum is rounded. Let t bound h from above where c is at most the
k-th smallest c, and l from below where c is not among the k - 1 smallest. Then

    L = l (1 - u) - e  <=  the k-th true distance  <=  t (1 + u) + e = U
    a neighbour has d <= U, so h <= (U + e) / (1 - u) = V, so c <= V^2 + g(V) = W
    c <= S^2 - g(S) with S = (L - e) / (1 + u) gives d <= L: surely one of the k

If no bin is full below W, all neighbours are among the columns with c <= W, at most 64 as a rule;
only those that are not sure need to be measured. Else W, which holds for any k columns, is what
`collect` needs. Data that suit fp16 badly make rows undecided, never wrong.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch
from .candidates import CAPACITY, DEPTH, NO_KEY, append, tile_bits
from .rounding import FARTHEST, TILE, eta, token_at

SURE: tl.constexpr = tl.constexpr(1 << 30)  # flags a column that need not be measured
NO_COLUMN: tl.constexpr = tl.constexpr(-1)
INFINITE_KEY: tl.constexpr = tl.constexpr(0x7F800000)
# A row a warp or two, whose sums hardly need shared memory. The interpreter pays by the program.
ROWS = 64 if triton.knobs.runtime.interpret else 1
SLACK: tl.constexpr = tl.constexpr(1 + 2**-17)  # rounding of the norms and of these bounds


@triton.jit
def _kth_smallest(order, K, bits):
    """Row by row, the largest number that fewer than K are below, its lowest bits zero."""
    kth = tl.zeros([order.shape[0]], tl.int32)
    for step in range(0, 31 - bits):
        trial = kth | (1 << (30 - step))
        fewer = tl.sum((order < trial[:, None]).to(tl.int32), axis=1) < K
        kth = tl.where(fewer, trial, kth)
    return kth


@triton.jit(do_not_specialize=["first", "N", "splits", "tiles", "tile_bits", "K"])
def _certify_kernel(
    # tensors
    bins_ptr,
    square_ptr,
    error_ptr,
    ratio_ptr,
    table_ptr,
    listed_ptr,
    count_ptr,
    limit_ptr,
    found_ptr,
    rest_ptr,
    rest_count_ptr,
    # sizes
    first,
    rows_per_image,
    N,
    padded_n,
    splits,
    tiles,
    tile_bits,
    K,
    gamma,
    eta,
    BLOCK_R: tl.constexpr,
    KEYS: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = rows_per_image // BLOCK_R
    image = (pid // blocks).to(tl.int64)
    local = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = first + local
    exists = token_at(row) < N
    position = tl.arange(0, KEYS)[None, :]
    entry_row = image * rows_per_image + local
    width = splits * (DEPTH * TILE)
    keys = tl.load(
        bins_ptr + entry_row[:, None] * width + position, mask=position < width, other=NO_KEY
    )  # [BLOCK_R, KEYS]
    # The k-th key up to its number of a tile, of which nothing below depends.
    kth = _kth_smallest(tl.maximum(keys, 0), K, tile_bits)
    tile_mask = (1 << tile_bits) - 1
    held = tl.minimum(kth, INFINITE_KEY - 1)
    at_most = (held | tile_mask).to(tl.float32, bitcast=True)
    at_least = (held & ~tile_mask).to(tl.float32, bitcast=True)

    a = tl.sqrt(tl.load(square_ptr + image * padded_n + row))
    u = tl.load(ratio_ptr + image)
    e = tl.load(error_ptr + image * padded_n + row) + u * a + eta
    gamma_a = gamma * a
    t = (gamma_a + tl.sqrt(at_most + 2.0 * gamma_a * a + gamma_a * gamma_a)) * SLACK
    below = (tl.sqrt(tl.maximum(at_least / SLACK - 2.0 * gamma_a * a, 0.0)) - gamma_a) / SLACK
    v = (t * (1.0 + u) + 2.0 * e) / (1.0 - u) * SLACK
    limit = (v * v + 2.0 * gamma_a * (a + v)) * SLACK  # W
    s = (below * (1.0 - u) - 2.0 * e) / (1.0 + u) / SLACK
    sure_limit = s * s / SLACK - 2.0 * gamma_a * (a + s)
    # u >= 1/2: half precision says nothing of this image. Not finite: nor of this row.
    limit = tl.where(u < 0.5, limit, float("inf"))
    bounded = (kth < INFINITE_KEY) & (limit <= FARTHEST)
    # The number of the tile stands in the low bits of a key, which c <= W may exceed W by.
    limit_key = tl.where(bounded, limit, 0.0).to(tl.int32, bitcast=True) | tile_mask
    sure_key = tl.where((s > 0.0) & (sure_limit > 0.0), sure_limit, 0.0).to(tl.int32, bitcast=True)

    candidate = keys <= limit_key[:, None]
    candidates = tl.sum(candidate.to(tl.int32), axis=1)
    full = candidate & (position // TILE % DEPTH == DEPTH - 1)  # it may have dropped a fourth
    complete = (candidates <= CAPACITY) & (tl.sum(full.to(tl.int32), axis=1) == 0)
    decided = bounded & complete & exists

    tile = (position // (DEPTH * TILE)) * tiles + (keys & tile_mask)
    column = token_at(tile * TILE + position % TILE)
    sure = candidate & ((keys | tile_mask) < sure_key[:, None]) & (sure_key > 0)[:, None]
    measured = (candidate & (sure == 0)).to(tl.int32)
    slot = tl.cumsum(measured, axis=1) - 1
    after = tl.sum(measured, axis=1)[:, None] + tl.cumsum(sure.to(tl.int32), axis=1) - 1
    out = table_ptr + entry_row[:, None] * CAPACITY
    entry = tl.where(sure, column | SURE, column)
    tl.store(out + tl.where(sure, after, slot), entry, mask=candidate & decided[:, None])
    slots = tl.arange(0, CAPACITY)[None, :]
    rest = tl.zeros([BLOCK_R, CAPACITY], tl.int32) + NO_COLUMN
    tl.store(out + slots, rest, mask=(slots >= candidates[:, None]) | (decided == 0)[:, None])
    undecided = exists & (decided == 0)
    listed = undecided & bounded
    item = image * rows_per_image
    place = append(listed_ptr + item, count_ptr + image, row, listed)
    tl.store(limit_ptr + item + place, limit, mask=listed)
    tl.store(found_ptr + item + place, 0, mask=listed)
    append(rest_ptr + item, rest_count_ptr + image, token_at(row), undecided & (bounded == 0))


def certify_launch(
    bins: torch.Tensor,
    square: torch.Tensor,
    error: torch.Tensor,
    ratio: torch.Tensor,
    table: torch.Tensor,
    undecided: tuple[torch.Tensor, ...],
    first: int,
    n: int,
    d: int,
    k: int,
) -> Launch:
    """Fills the table and the lists of one pass; error and ratio are r and u.

    undecided: `nearest.Undecided`, of which the two counts must be zeros.
    """
    batch, rows, splits = bins.shape[:3]
    padded_n = square.shape[1]
    assert table.shape == (batch, rows, CAPACITY.value) and table.is_contiguous()
    listed, count, limit, found, rest, rest_count = undecided
    keys = triton.next_power_of_2(DEPTH.value * TILE.value * splits)
    return Launch(
        _certify_kernel,
        batch * (rows // ROWS),
        dict(bins_ptr=bins, square_ptr=square, error_ptr=error, ratio_ptr=ratio, table_ptr=table)
        | dict(listed_ptr=listed, count_ptr=count, limit_ptr=limit, found_ptr=found)
        | dict(rest_ptr=rest, rest_count_ptr=rest_count)
        | dict(first=first, rows_per_image=rows, N=n, padded_n=padded_n, splits=splits, K=k)
        | dict(tiles=padded_n // TILE.value // splits, tile_bits=tile_bits(padded_n // splits))
        | dict(gamma=gamma(d), eta=eta(d)),
        dict(BLOCK_R=ROWS, KEYS=keys),
        dict(num_warps=max(1, keys // 1024)),  # more keys a warp spill
    )


def gamma(d: int) -> float:
    """Returns a bound on the rounding of a sum of d products, as a share of the norms' product.

    Tensor cores add 16 products at a time to the sum and truncate each to the largest of them: 17
    units of 2^-23 a step.
    """
    return (1.1 * d + 64) * 2.0**-23
