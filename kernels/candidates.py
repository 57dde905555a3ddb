"""Candidates for the nearest neighbours, from one pass in half precision.

    c_ij = a_i^2 + a_j^2 - 2 y_i y_j        y and a of `rounding.py`

-> bins (rows, splits, 3, 64) int32: of the columns that meet in a bin, the three smallest c.

Half precision, as its tensor cores are eight times as fast as three tf32 products; fp16, as it
rounds eight times finer than bfloat16. What the rounding can do, `certify.py` bounds.

A program of `bins` owns BLOCK_M rows and a share of the columns, whose tiles of 64 it folds onto 64
bins a row. A bin is a position of the accumulator, which min and max alone keep: no shuffles, no
shared memory, 8 instructions a distance where a running top 32 takes 70 to 125. The low bits of c
make room for the number of the tile, so that one int32 is distance and column.

Rows of which the bins may have lost a neighbour, but whose k-th distance they bound, are listed;
`collect` goes through the columns once more for these and takes all that are near enough, up to 64.
It appends rows with more to the list of the search over measured distances (`knn.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import Launch
from .rounding import TILE, token_at

BLOCK_M = 128
DEPTH: tl.constexpr = tl.constexpr(3)  # columns that a bin keeps
CAPACITY: tl.constexpr = tl.constexpr(64)  # candidates that a row can have
NO_KEY: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def _keep(key, tile, nearest, second, third):
    """Into the three smallest of each bin [BLOCK_M, 64] the keys of a tile of 64 columns."""
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
    """How many programs share the columns of a block when `count` rows are shared out."""
    blocks = tl.maximum(tl.cdiv(count, BLOCK_M), 1)
    return tl.maximum(tl.minimum(programs // blocks, most), 1)


@triton.jit
def append(list_ptr, count_ptr, item, mask):
    """Appends the items of a block to a list, in any order, and counts them."""
    place = tl.atomic_add(count_ptr + item * 0, 1, mask=mask)
    tl.store(list_ptr + place, item, mask=mask)
    return place


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


def block_columns(n: int, d: int, hopper: bool) -> int:
    """Columns a step of `bins`: what kept an H200's tensor cores busiest (bench/NOTES.md).

    128 columns go with rows that are held. Elsewhere than on Hopper more than 64 spill registers,
    and of few tokens more would share a bin.
    """
    if n <= 1024 or not hopper:
        return 64
    return 128 if d <= 256 else 256


def tile_bits(columns: int) -> int:
    """The number of low bits of a key that hold the number of one of the tiles of the columns."""
    return (columns // TILE.value - 1).bit_length()
