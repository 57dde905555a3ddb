"""Candidates for the nearest neighbours, from one pass in half precision.

    c_ij = a_i^2 + a_j^2 - 2 y_i y_j        y and a of `rounding.py`

-> bins (rows, splits, 3, 64) int32: of the columns that meet in a bin, the three smallest c.

Half precision, as its tensor cores are eight times as fast as three tf32 products; fp16, as it
rounds eight times finer than bfloat16. What the rounding can do, `certify.py` bounds.

A program of `bins` owns BLOCK_M rows and a share of the columns, whose tiles of 64 it folds onto 64
bins a row. A bin is a position of the accumulator, which min and max alone keep: no shuffles, no
shared memory, 8 instructions a distance where a running top 32 takes 70 to 125. The low bits of c
make room for the number of the tile, so that one int32 is distance and column.

`certify.py` tells which rows may have lost a neighbour so; `collect.py` searches these once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import Architecture, Launch
from .rounding import TILE

BLOCK_M = 128
DEPTH: tl.constexpr = tl.constexpr(3)  # columns that a bin keeps
CAPACITY: tl.constexpr = tl.constexpr(64)  # candidates that a row can have
NO_KEY: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def _keep(key, tile, nearest, second, third):
    """The three smallest keys of each bin [BLOCK_M, 64], with those of one more tile."""
    key = key | tile
    farther = tl.maximum(nearest, key)
    farthest = tl.maximum(second, farther)
    return tl.minimum(nearest, key), tl.minimum(second, farther), tl.minimum(third, farthest)


@triton.jit
def _halves(key):
    pairs = tl.reshape(key, [key.shape[0], 2, key.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))


@triton.jit
def _keep_two(key, tile, nearest, second, third):
    left, right = _halves(key)
    nearest, second, third = _keep(left, tile, nearest, second, third)
    return _keep(right, tile + 1, nearest, second, third)


@triton.jit
def _fold(key, tile, nearest, second, third):
    """`_keep` for 1, 2 or 4 tiles. No recursion, which Triton 3.4 cannot hash."""
    columns: tl.constexpr = key.shape[1]
    if columns == 64:
        nearest, second, third = _keep(key, tile, nearest, second, third)
    elif columns == 128:
        nearest, second, third = _keep_two(key, tile, nearest, second, third)
    else:
        tl.static_assert(columns == 256)
        left, right = _halves(key)
        nearest, second, third = _keep_two(left, tile, nearest, second, third)
        nearest, second, third = _keep_two(right, tile + 2, nearest, second, third)
    return nearest, second, third


@triton.jit(do_not_specialize=["first", "steps", "splits", "tile_mask"])
def _bins_kernel(
    # tensors
    rows_desc,
    cols_desc,
    square_ptr,
    bins_ptr,
    # sizes
    first,
    rows_per_image,
    padded_n,
    padded_d,
    steps,
    splits,
    tile_mask,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HELD: tl.constexpr,
):
    pid = tl.program_id(0)
    split = pid % splits
    blocks = rows_per_image // BLOCK_M
    image = pid // splits // blocks
    start_row = first + (pid // splits % blocks) * BLOCK_M
    rows = start_row + tl.arange(0, BLOCK_M)
    above = image * padded_n  # rows of the images before
    square_ptr += above
    row_square = tl.load(square_ptr + rows)
    if HELD:  # the rows fit one block of channels
        left = rows_desc.load([above + start_row, 0])

    nearest = tl.full([BLOCK_M, TILE], NO_KEY, tl.int32)
    second = tl.full([BLOCK_M, TILE], NO_KEY, tl.int32)
    third = tl.full([BLOCK_M, TILE], NO_KEY, tl.int32)
    for step in range(0, steps):
        start = (split * steps + step) * BLOCK_N
        cols = start + tl.arange(0, BLOCK_N)
        if HELD:
            dot = tl.dot(left, cols_desc.load([above + start, 0]).T)
        else:
            dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for d in range(0, padded_d, BLOCK_D):
                part = rows_desc.load([above + start_row, d])
                dot = tl.dot(part, cols_desc.load([above + start, d]).T, dot)
        c = (row_square[:, None] + tl.load(square_ptr + cols)[None, :]) - 2.0 * dot
        # Bits of floats order like the floats from 0 on; what rounding made negative comes first.
        key = c.to(tl.int32, bitcast=True) & ~tile_mask
        if (start < start_row + BLOCK_M) & (start + BLOCK_N > start_row):
            key = tl.where(rows[:, None] == cols[None, :], NO_KEY & ~tile_mask, key)
        tile = step * (BLOCK_N // TILE)
        nearest, second, third = _fold(key, tile, nearest, second, third)

    row = (image * rows_per_image + (rows - first)).to(tl.int64)
    bins_ptr += (row[:, None] * splits + split) * (DEPTH * TILE)
    out = bins_ptr + tl.arange(0, TILE)[None, :]
    tl.store(out, nearest)
    tl.store(out + TILE, second)
    tl.store(out + 2 * TILE, third)


@triton.jit
def share(count, BLOCK_M: tl.constexpr, programs, most):
    """Returns how many programs share the columns of a block when `count` rows are shared out."""
    blocks = tl.maximum(tl.cdiv(count, BLOCK_M), 1)
    return tl.maximum(tl.minimum(programs // blocks, most), 1)


@triton.jit
def append(list_ptr, count_ptr, item, mask):
    """Appends the items of a block to a list, in any order, and counts them."""
    place = tl.atomic_add(count_ptr + item * 0, 1, mask=mask)
    tl.store(list_ptr + place, item, mask=mask)
    return place


def bins_launch(
    half: torch.Tensor, square: torch.Tensor, bins: torch.Tensor, first: int, block_n: int
) -> Launch:
    """Bins (B, rows, SPLITS, 3, 64) of the rows first, ..., first + rows - 1 of each image."""
    batch, padded_n, padded_d = half.shape
    rows, splits = bins.shape[1:3]
    assert rows % BLOCK_M == 0 and first % BLOCK_M == 0 and bins.is_contiguous()
    steps = padded_n // block_n // splits
    assert steps * splits * block_n == padded_n
    held = block_n == 128
    block_d = padded_d if held else 64
    flat = half.view(batch * padded_n, padded_d)
    return Launch(
        _bins_kernel,
        batch * (rows // BLOCK_M) * splits,
        dict(rows_desc=TensorDescriptor.from_tensor(flat, [BLOCK_M, block_d]))
        | dict(cols_desc=TensorDescriptor.from_tensor(flat, [block_n, block_d]))
        | dict(square_ptr=square, bins_ptr=bins, first=first, rows_per_image=rows)
        | dict(padded_n=padded_n, padded_d=padded_d, steps=steps, splits=splits)
        | dict(tile_mask=2 ** tile_bits(padded_n // splits) - 1),
        dict(BLOCK_M=BLOCK_M, BLOCK_N=block_n, BLOCK_D=block_d, HELD=held),
        dict(num_warps=8, num_stages=2 if held else 3),
    )


def block_columns(n: int, d: int, gpu: Architecture) -> int:
    """Columns a step of `bins`: what kept an H200's tensor cores busiest (bench/NOTES.md).

    128 columns go with rows that are held. Elsewhere than on Hopper more than 64 spill registers,
    and of few tokens more would share a bin.
    """
    if n <= 1024 or not gpu.hopper:
        return 64
    return 128 if d <= 256 else 256


def tile_bits(columns: int) -> int:
    """The number of low bits of a key that hold the number of one of the tiles of the columns."""
    return (columns // TILE.value - 1).bit_length()
