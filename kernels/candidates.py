"""Candidates for the nearest neighbours, from one pass in half precision.

    y_j  = fp16(s (x_j - m)),  a_j = ||y_j||,  r_j = ||s (x_j - m) - y_j||
    c_ij = a_i^2 + a_j^2 - 2 y_i y_j

x (B, N, D) any strides, m (B, D) and s (B,) float32, s a power of two
-> bins (rows, SPLITS, 3, BLOCK_N) int32: of the columns that meet in a bin, the three smallest c.

Half precision, as its tensor cores are eight times as fast as three tf32 products; fp16, as it
rounds eight times finer than bfloat16. What the rounding can do, `certify.py` bounds: y, a^2 and r
are written once, padded, so that the loop over the columns loads without masks.

A program owns BLOCK_M rows and a share of the columns. Each position of its accumulator is a bin,
which min and max alone keep: no shuffles, no shared memory, 8 instructions a distance where a
running top 32 takes 70 to 125. The low bits of c make room for the number of the tile, so that one
int32 is distance and column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, strides

# 128 x 64 leaves room for three numbers a bin without spills. A row is undecided where three of its
# candidates meet in a bin: 1.5 % of the rows of random data, none of an image's, whose neighbours
# are neighbouring columns (2304 tokens, bench/NOTES.md).
BLOCK_M, BLOCK_N, DEPTH = 128, 64, 3
LARGEST_HALF: tl.constexpr = tl.constexpr(65504.0)
FARTHEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)  # the largest float32
NO_KEY: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def _round_kernel(
    # tensors
    x_ptr,
    mean_ptr,
    scale_ptr,
    half_ptr,
    square_ptr,
    error_ptr,
    # sizes
    N,
    D,
    padded_n,
    padded_d,
    # strides
    stride_xb,
    stride_xn,
    stride_xd,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = padded_n // BLOCK_R
    image = (pid // blocks).to(tl.int64)
    rows = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ptrs = x_ptr + image * stride_xb + rows.to(tl.int64)[:, None] * stride_xn  # [BLOCK_R, 1]
    token = image * padded_n + rows
    scale = tl.load(scale_ptr + image)
    square = tl.zeros([BLOCK_R], tl.float32)
    error = tl.zeros([BLOCK_R], tl.float32)
    for d in range(0, padded_d, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (dims < D)[None, :]
        x = tl.load(row_ptrs + dims.to(tl.int64)[None, :] * stride_xd, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + image * D + dims, mask=dims < D, other=0.0)
        exact = tl.where(inside, (x.to(tl.float32) - mean[None, :]) * scale, 0.0)
        # Finite in any case: one token that is not must not reach the products of the others.
        held = tl.minimum(tl.maximum(exact, -LARGEST_HALF), LARGEST_HALF)
        half = tl.where(exact == exact, held, 0.0).to(tl.float16)
        tl.store(half_ptr + token[:, None] * padded_d + dims[None, :], half)
        y = half.to(tl.float32)
        square += tl.sum(y * y, axis=1)
        error += tl.sum((exact - y) * (exact - y), axis=1)
    # The second term is the rounding of x - m.
    error = tl.sqrt(error) * 1.001 + tl.sqrt(square) * 2.0**-22
    usable = (rows < N) & (error <= FARTHEST) & (square <= FARTHEST)
    tl.store(square_ptr + token, tl.where(usable, square, float("inf")))
    tl.store(error_ptr + token, tl.where(usable, error, 0.0))


@triton.jit
def _bins_kernel(
    # tensors
    half_ptr,
    square_ptr,
    bins_ptr,
    # sizes
    first,
    rows_per_image,
    padded_n,
    padded_d,
    tiles,
    SPLITS: tl.constexpr,
    TILE_MASK: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    pid = tl.program_id(0)
    split = pid % SPLITS
    blocks = rows_per_image // BLOCK_M
    image = (pid // SPLITS // blocks).to(tl.int64)
    start_row = first + (pid // SPLITS % blocks) * BLOCK_M
    rows = start_row + tl.arange(0, BLOCK_M)
    half_ptr += image * padded_n * padded_d
    square_ptr += image * padded_n
    row_ptrs = half_ptr + rows.to(tl.int64)[:, None] * padded_d  # [BLOCK_M, 1]
    row_square = tl.load(square_ptr + rows)
    dims = tl.arange(0, BLOCK_D)
    if WHOLE:
        yi = tl.load(row_ptrs + dims[None, :])  # [BLOCK_M, BLOCK_D]

    nearest = tl.full([BLOCK_M, BLOCK_N], NO_KEY, tl.int32)
    second = tl.full([BLOCK_M, BLOCK_N], NO_KEY, tl.int32)
    third = tl.full([BLOCK_M, BLOCK_N], NO_KEY, tl.int32)
    for tile in range(0, tiles):
        start = (split * tiles + tile) * BLOCK_N
        cols = start + tl.arange(0, BLOCK_N)
        col_ptrs = half_ptr + cols.to(tl.int64)[None, :] * padded_d  # [1, BLOCK_N]
        if WHOLE:
            dot = tl.dot(yi, tl.load(col_ptrs + dims[:, None]))
        else:
            dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for d in range(0, padded_d, BLOCK_D):
                left = tl.load(row_ptrs + (d + dims)[None, :])  # [BLOCK_M, BLOCK_D]
                dot = tl.dot(left, tl.load(col_ptrs + (d + dims)[:, None]), dot)
        c = (row_square[:, None] + tl.load(square_ptr + cols)[None, :]) - 2.0 * dot
        # Bits of floats order like the floats from 0 on; what rounding made negative comes first.
        key = (c.to(tl.int32, bitcast=True) & ~TILE_MASK) | tile
        if (start < start_row + BLOCK_M) & (start + BLOCK_N > start_row):
            key = tl.where(rows[:, None] == cols[None, :], NO_KEY, key)
        farther = tl.maximum(nearest, key)
        nearest = tl.minimum(nearest, key)
        farthest = tl.maximum(second, farther)
        second = tl.minimum(second, farther)
        third = tl.minimum(third, farthest)

    row = image * rows_per_image + (rows - first)
    out = (
        bins_ptr + (row[:, None] * SPLITS + split) * (3 * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
    )
    tl.store(out, nearest)
    tl.store(out + BLOCK_N, second)
    tl.store(out + 2 * BLOCK_N, third)


def round_launch(
    x: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    half: torch.Tensor,
    square: torch.Tensor,
    error: torch.Tensor,
) -> Launch:
    """x (B, N, D) to half (B, padded N, padded D) float16, square and error (B, padded N)."""
    batch, n, d = x.shape
    padded_n, padded_d = half.shape[1:]
    assert padded_n % 32 == 0 and padded_d % 64 == 0 and half.is_contiguous()
    return Launch(
        _round_kernel,
        batch * (padded_n // 32),
        dict(x_ptr=x, mean_ptr=mean, scale_ptr=scale, half_ptr=half)
        | dict(square_ptr=square, error_ptr=error, N=n, D=d)
        | dict(padded_n=padded_n, padded_d=padded_d, **strides("x", x, "bnd")),
        dict(BLOCK_R=32, BLOCK_D=64),
        dict(num_warps=4),
    )


def bins_launch(half: torch.Tensor, square: torch.Tensor, bins: torch.Tensor, first: int) -> Launch:
    """Bins (B, rows, SPLITS, 3, BLOCK_N) of the rows first, ..., first + rows - 1 of each image."""
    batch, padded_n, padded_d = half.shape
    rows, splits = bins.shape[1:3]
    assert rows % BLOCK_M == 0 and first % BLOCK_M == 0 and bins.is_contiguous()
    tiles = padded_n // BLOCK_N // splits
    assert tiles * splits * BLOCK_N == padded_n
    return Launch(
        _bins_kernel,
        batch * (rows // BLOCK_M) * splits,
        dict(half_ptr=half, square_ptr=square, bins_ptr=bins, first=first, rows_per_image=rows)
        | dict(padded_n=padded_n, padded_d=padded_d, tiles=tiles),
        dict(SPLITS=splits, TILE_MASK=tile_mask(tiles), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
        | dict(BLOCK_D=padded_d if padded_d <= 256 else 64, WHOLE=padded_d <= 256),
        dict(num_warps=8, num_stages=3),
    )


def tile_mask(tiles: int) -> int:
    """The low bits of a key that hold the number of one of so many tiles."""
    return triton.next_power_of_2(tiles) - 1
