"""Nearest neighbours of every token among the others: distances never leave the chip.

    indices(i) = the k columns j != i with the smallest (||x_i - x_j||^2, j), in that order

x (B, N, D) any strides, mean (B, D) float32 -> indices (B, N, k) int64 and squared distances. The
matrix of distances would be N^2 floats, 27.5 GB at N = 82,944.

A search finds a table of candidates for every row, and `settle.py` measures those whose place is
open. `nearest.py` chooses between two searches:

- in single precision (here): scores ||x_j - m||^2 - 2 (x_i - m)(x_j - m), which rank like the
  distance along a row. A score and its column make one 64-bit key, ties by the lower column. Per
  tile, the nearest remaining column of every row replaces the worst of its K best until no row
  gains: after c columns a tile brings about K BLOCK_N / c (the selection of FlashLib's insert
  kernel, here on keys).
- in half precision (`candidates.py`), where a certificate (`certify.py`) says for each row that no
  neighbour was missed. Rows without one, for which `collect` finds too many candidates, go through
  the search in single precision, in the same chain of launches and without waiting for the GPU to
  count them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import CAPACITY, share
from .certify import NO_COLUMN, SURE
from .rounding import FARTHEST, token_at

NO_KEY: tl.constexpr = tl.constexpr(2**63 - 1)


@triton.jit
def _keep_nearest(best, key):
    """Row by row, the smallest keys of best [R, K] and key [R, C], in any order."""
    nearest = tl.min(key, axis=1)
    worst = tl.max(best, axis=1)
    while tl.max((nearest < worst).to(tl.int32), axis=0) > 0:
        best = tl.where(
            (nearest < worst)[:, None] & (best == worst[:, None]), nearest[:, None], best
        )
        key = tl.where(key == nearest[:, None], NO_KEY, key)
        nearest = tl.min(key, axis=1)
        worst = tl.max(best, axis=1)
    return best


@triton.jit
def _search_kernel(
    # tensors
    x_ptr,
    mean_ptr,
    listed_ptr,
    count_ptr,
    found_ptr,
    keys_ptr,
    # sizes
    N,
    D,
    K,
    rows_per_image,
    programs,
    # strides
    stride_xb,
    stride_xn,
    stride_xd,
    LISTED: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    image = (pid // programs).to(tl.int64)
    count = tl.load(count_ptr + image) if LISTED else N
    splits = share(count, BLOCK_M, programs, MOST_SPLITS)
    block, split = pid % programs // splits, pid % programs % splits
    slot = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # Blocks beyond the rows, of which a list may leave many, have no columns to look at.
    end = tl.where(block * BLOCK_M < count, N, 0)
    if LISTED:
        item = image * rows_per_image + slot
        rows = token_at(tl.load(listed_ptr + item, mask=slot < count, other=0))
        found = tl.load(found_ptr + item, mask=slot < count, other=0)
        end = tl.where(tl.max(found, axis=0) > CAPACITY, N, 0)
    else:
        rows = slot
    x_ptr += image * stride_xb
    row_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xn  # [BLOCK_M, 1]
    slots = tl.arange(0, BLOCK_K).to(tl.int64)

    # Unlike each other, so that one replacement fills one slot; slots beyond K are never the worst.
    empty = tl.where(slots < K, NO_KEY - slots, -NO_KEY)
    best = tl.zeros([BLOCK_M, 1], tl.int64) + empty[None, :]  # [BLOCK_M, BLOCK_K]
    for start in range(split * BLOCK_N, end, splits * BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_ptrs = x_ptr + cols.to(tl.int64)[:, None] * stride_xn  # [BLOCK_N, 1]
        dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        norm = tl.zeros([BLOCK_N], tl.float32)
        for d in range(0, D, BLOCK_D):
            dims = d + tl.arange(0, BLOCK_D)
            offsets = dims.to(tl.int64)[None, :] * stride_xd
            inside = dims < D
            mean = tl.load(mean_ptr + image * D + dims, mask=inside, other=0.0)
            xi = tl.load(
                row_ptrs + offsets, mask=(rows < N)[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            xj = tl.load(
                col_ptrs + offsets, mask=(cols < N)[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            xi -= mean[None, :]  # [BLOCK_M, BLOCK_D]
            xj -= mean[None, :]  # [BLOCK_N, BLOCK_D]
            dot = tl.dot(xi, tl.trans(xj), dot, input_precision=PRECISION)
            norm += tl.sum(xj * xj, axis=1)
        score = norm[None, :] - 2.0 * dot  # [BLOCK_M, BLOCK_N]
        # A token with a NaN or an infinity is the farthest of all, never chosen before others.
        finite = (norm[None, :] <= FARTHEST) & (tl.abs(score) <= FARTHEST)
        score = tl.where(finite, score, FARTHEST)

        bits = score.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders like the numbers do
        key = (bits.to(tl.int64) << 32) | cols.to(tl.int64)[None, :]  # [BLOCK_M, BLOCK_N]
        key = tl.where((cols < N)[None, :] & (cols[None, :] != rows[:, None]), key, NO_KEY)

        best = _keep_nearest(best, key)

    best = tl.where((slots < K)[None, :], best, NO_KEY)
    keys_ptr += pid.to(tl.int64) * (BLOCK_M * BLOCK_K)
    offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(keys_ptr + offsets, best)


@triton.jit
def _merge_kernel(
    # tensors
    keys_ptr,
    listed_ptr,
    count_ptr,
    found_ptr,
    table_ptr,
    # sizes
    N,
    K,
    sure,
    first,
    rows_per_image,
    programs,
    LISTED: tl.constexpr,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(rows_per_image, BLOCK_R)
    image = (pid // blocks).to(tl.int64)
    place = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    count = tl.load(count_ptr + image) if LISTED else N
    exists = place < count
    if LISTED:
        item = image * rows_per_image + place
        row = tl.load(listed_ptr + item, mask=exists, other=first)
        exists = tl.load(found_ptr + item, mask=exists, other=0) > CAPACITY
        if tl.max(exists.to(tl.int32), axis=0) == 0:
            return
    else:
        row = place
    splits = share(count, BLOCK_M, programs, MOST_SPLITS)
    places = tl.arange(0, BLOCK_K)[None, :]
    item = (image * programs + place // BLOCK_M * splits) * BLOCK_M + place % BLOCK_M
    key_ptrs = keys_ptr + item[:, None] * BLOCK_K + places  # [BLOCK_R, BLOCK_K]
    best = tl.load(key_ptrs, mask=exists[:, None], other=NO_KEY)
    best = tl.where(places < K, best, -NO_KEY)  # what nothing replaces
    for split in range(1, splits):
        ptrs = key_ptrs + split * (BLOCK_M * BLOCK_K)
        best = _keep_nearest(best, tl.load(ptrs, mask=exists[:, None], other=NO_KEY))
    best = tl.where(places < K, best, NO_KEY)
    out = table_ptr + (image * rows_per_image + row - first) * BLOCK_C
    for slot in range(0, K):
        nearest = tl.min(best, axis=1)
        column = (nearest & 0xFFFFFFFF).to(tl.int32)
        # Those to be measured come first.
        entry = tl.where(slot < sure, column | SURE, column)
        tl.store(out + tl.where(slot < sure, K - sure + slot, slot - sure), entry, mask=exists)
        best = tl.where(best == nearest[:, None], NO_KEY, best)
    rest = tl.arange(0, BLOCK_C)[None, :]
    empty = tl.zeros([BLOCK_R, BLOCK_C], tl.int32) + NO_COLUMN
    tl.store(out[:, None] + rest, empty, mask=exists[:, None] & (rest >= K))
