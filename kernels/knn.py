"""Nearest neighbours of every token among the others: distances never leave the chip.

    indices(i) = the k columns j != i with the smallest (d2(i, j), j), in that order
    d2(i, j)   = sum (x_i - x_j)^2 in float32, +inf where the sum overflows, NaN where x_i or x_j
                 holds a NaN or an infinity; finite < +inf < NaN

x (B, N, D) any strides -> indices (B, N, k) int64 and squared distances (B, N, k or 1) float32. The
matrix of distances would be N^2 floats, 27.5 GB at N = 82,944.

The search of this file measures every distance that it compares. Sums of squared differences need
no centre and lose no digits to large norms, so the result needs no certificate: any two distances
that it orders wrongly tie within their own float32 rounding. It takes two operations a channel and
pair and no tensor cores. A distance and its column make one 64-bit key, ties by the lower column.
Per tile, the nearest remaining column of every row replaces the worst of its k best until no row
gains: after c columns a tile brings about k BLOCK_N / c (the selection of FlashLib's insert kernel,
here on keys).

`nearest.py` gives this search all rows of short inputs and long lists, and of other inputs the rows
that the pass in half precision (`candidates.py`) and its certificate (`certify.py`) leave. Those
rows are in a list that is counted on the device; nothing waits for the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import share
from .rounding import FARTHEST

# Rows of a program, and the columns times channels of a step: 64 registers a thread of four warps.
# The interpreter pays by the operation, not by the number.
ROWS, PAIRS = (64, 4096) if triton.knobs.runtime.interpret else (8, 1024)
NO_KEY: tl.constexpr = tl.constexpr(2**63 - 1)
NAN_BITS: tl.constexpr = tl.constexpr(0x7FC00000)  # one NaN, above the bits of every number


@triton.jit
def infinities_to_nan(x):
    """x in float32 with NaN for an infinity, so that all distances of its token are NaN.

    The difference to another token could not show it: that of finite numbers may overflow.
    """
    x = x.to(tl.float32)
    return tl.where(tl.abs(x) <= FARTHEST, x, float("nan"))


@triton.jit
def distance_bits(distance):
    """The bits of squared distances, as int32 ordered like them; NaN comes last."""
    return tl.where(distance == distance, distance.to(tl.int32, bitcast=True), NAN_BITS)


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


@triton.jit(do_not_specialize=["N", "K", "programs"])
def _search_kernel(
    # tensors
    x_ptr,
    listed_ptr,
    count_ptr,
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
):
    pid = tl.program_id(0)
    image = (pid // programs).to(tl.int64)
    count = tl.load(count_ptr + image) if LISTED else N
    splits = share(count, BLOCK_M, programs, MOST_SPLITS)
    block, split = pid % programs // splits, pid % programs % splits
    if block * BLOCK_M >= count:
        return
    slot = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # Slots beyond the rows repeat a token; `merge` reads nothing of them.
    if LISTED:
        rows = tl.load(listed_ptr + image * rows_per_image + slot, mask=slot < count, other=0)
    else:
        rows = tl.minimum(slot, N - 1)
    x_ptr += image * stride_xb
    row_ptrs = x_ptr + rows.to(tl.int64)[:, None, None] * stride_xn  # [BLOCK_M, 1, 1]
    # The lists stay in memory, as registers go to the distances: a tile that brings a nearer column
    # takes them out.
    slots = tl.arange(0, BLOCK_K)
    keys_ptr += pid.to(tl.int64) * (BLOCK_M * BLOCK_K)
    list_ptrs = keys_ptr + tl.arange(0, BLOCK_M)[:, None] * BLOCK_K + slots[None, :]
    # Unlike each other, so that one replacement fills one slot; slots beyond K are never the worst.
    empty = tl.where(slots < K, NO_KEY - slots.to(tl.int64), -NO_KEY)
    tl.store(list_ptrs, tl.zeros([BLOCK_M, 1], tl.int64) + empty[None, :])
    tl.debug_barrier()
    worst = tl.full([BLOCK_M], NO_KEY, tl.int64)
    for start in range(split * BLOCK_N, N, splits * BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col = tl.minimum(cols, N - 1).to(tl.int64)
        col_ptrs = x_ptr + col[None, :, None] * stride_xn  # [1, BLOCK_N, 1]
        total = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_D], tl.float32)
        for d in range(0, D, BLOCK_D):
            dims = (d + tl.arange(0, BLOCK_D))[None, None, :]
            offsets = dims.to(tl.int64) * stride_xd
            xi = tl.load(row_ptrs + offsets, mask=dims < D, other=0.0)  # [BLOCK_M, 1, BLOCK_D]
            xj = tl.load(col_ptrs + offsets, mask=dims < D, other=0.0)  # [1, BLOCK_N, BLOCK_D]
            difference = infinities_to_nan(xi) - infinities_to_nan(xj)
            total += difference * difference
        bits = distance_bits(tl.sum(total, axis=2))  # [BLOCK_M, BLOCK_N]
        key = (bits.to(tl.int64) << 32) | cols.to(tl.int64)[None, :]
        key = tl.where((cols < N)[None, :] & (cols[None, :] != rows[:, None]), key, NO_KEY)
        if tl.max((tl.min(key, axis=1) < worst).to(tl.int32), axis=0) > 0:
            best = _keep_nearest(tl.load(list_ptrs), key)
            worst = tl.max(best, axis=1)
            tl.debug_barrier()
            tl.store(list_ptrs, best)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["N", "K", "programs"])
def _merge_kernel(
    # tensors
    keys_ptr,
    listed_ptr,
    count_ptr,
    indices_ptr,
    distances_ptr,
    # sizes
    N,
    K,
    rows_per_image,
    programs,
    LISTED: tl.constexpr,
    ALL: tl.constexpr,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(rows_per_image, BLOCK_R)
    image = (pid // blocks).to(tl.int64)
    first = (pid % blocks) * BLOCK_R
    count = tl.load(count_ptr + image) if LISTED else N
    if first >= count:
        return
    place = first + tl.arange(0, BLOCK_R)
    exists = place < count
    if LISTED:
        row = tl.load(listed_ptr + image * rows_per_image + place, mask=exists, other=0)
    else:
        row = place
    splits = share(count, BLOCK_M, programs, MOST_SPLITS)
    places = tl.arange(0, BLOCK_K)[None, :]
    holds = exists[:, None] & (places < K)  # the slots beyond are below every key
    item = (image * programs + place // BLOCK_M * splits) * BLOCK_M + place % BLOCK_M
    key_ptrs = keys_ptr + item[:, None] * BLOCK_K + places  # [BLOCK_R, BLOCK_K]
    best = tl.load(key_ptrs, mask=holds, other=-NO_KEY)
    for split in range(1, splits):
        ptrs = key_ptrs + split * (BLOCK_M * BLOCK_K)
        best = _keep_nearest(best, tl.load(ptrs, mask=holds, other=NO_KEY))
    best = tl.where(places < K, best, NO_KEY)
    out = image * N + row
    for slot in range(0, K):
        nearest = tl.min(best, axis=1)
        tl.store(indices_ptr + out * K + slot, nearest & 0xFFFFFFFF, mask=exists)
        distance = (nearest >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        if ALL:
            tl.store(distances_ptr + out * K + slot, distance, mask=exists)
        else:
            tl.store(distances_ptr + out, distance, mask=exists & (slot == K - 1))
        best = tl.where(best == nearest[:, None], NO_KEY, best)
