"""Candidates for the nearest neighbours, from one pass of half-precision products.

    c_ij = a_i^2 + a_j^2 - 2 y_i y_j        row i, column j, y and a of `rounding.py`

-> bins (B, R, shares, 3, 64) int32: the keys of the three smallest c of each bin.

The products are in half precision, as its tensor cores are eight times as fast as three tf32
products, and in fp16, as it rounds eight times finer than bfloat16. `certify.py` bounds the error.

A program owns BLOCK_M rows and a share of the columns, whose tiles of 64 it folds onto 64 bins a
row. A bin is a position of the accumulator, which min and max alone keep: no shuffles, no shared
memory, 8 instructions a distance where a running top 32 takes 70 to 125. A key is one int32: c as
bits, of which the lowest are replaced by the number of the column's tile.

A bin may drop a neighbour. `certify.py` tells which rows may have lost one, and `collect.py`
searches these rows once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .._launch import Architecture, Launch
from .table import NO_KEY, TILE, Rounded

BLOCK_M = 128
DEPTH: tl.constexpr = tl.constexpr(3)  # columns that a bin keeps


@triton.jit
def _keep(bits, tile, tile_mask, nearest, second, third):
    """Returns the three smallest keys of each bin [BLOCK_M, 64] after one more tile."""
    key = (bits & ~tile_mask) | tile  # side by side, the two are one LOP3
    farther = tl.maximum(nearest, key)
    farthest = tl.maximum(second, farther)
    return tl.minimum(nearest, key), tl.minimum(second, farther), tl.minimum(third, farthest)


@triton.jit
def _halves(bits):
    """Returns the left and the right half of the columns, without moving data."""
    pairs = tl.reshape(bits, [bits.shape[0], 2, bits.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))


@triton.jit
def _keep_two(bits, tile, tile_mask, nearest, second, third):
    left, right = _halves(bits)
    nearest, second, third = _keep(left, tile, tile_mask, nearest, second, third)
    return _keep(right, tile + 1, tile_mask, nearest, second, third)


@triton.jit
def _fold(bits, tile, tile_mask, nearest, second, third):
    """Applies `_keep` to 1, 2 or 4 tiles, without recursion, which Triton 3.4 cannot hash."""
    columns: tl.constexpr = bits.shape[1]
    if columns == 64:
        nearest, second, third = _keep(bits, tile, tile_mask, nearest, second, third)
    elif columns == 128:
        nearest, second, third = _keep_two(bits, tile, tile_mask, nearest, second, third)
    else:
        tl.static_assert(columns == 256)
        left, right = _halves(bits)
        nearest, second, third = _keep_two(left, tile, tile_mask, nearest, second, third)
        nearest, second, third = _keep_two(right, tile + 2, tile_mask, nearest, second, third)
    return nearest, second, third


@triton.jit(do_not_specialize=["first", "steps", "shares", "tile_mask"])
def _bins_kernel(
    # tensors
    rows_desc,
    cols_desc,
    row_a2_ptr,
    col_a2_ptr,
    bins_ptr,
    # sizes
    first,
    rows_per_image,
    padded_m,
    padded_n,
    padded_d,
    steps,
    shares,
    tile_mask,
    EXCLUDE_SELF: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HELD: tl.constexpr,
):
    pid = tl.program_id(0)
    share = pid % shares
    blocks = rows_per_image // BLOCK_M
    image = pid // shares // blocks
    start_position = first + (pid // shares % blocks) * BLOCK_M
    positions = start_position + tl.arange(0, BLOCK_M)
    rows_above = image * padded_m  # positions of the images before
    cols_above = image * padded_n
    col_a2_ptr += cols_above
    row_a2 = tl.load(row_a2_ptr + rows_above + positions)
    if HELD:  # one block of channels holds the rows, which stay in shared memory
        left = rows_desc.load([rows_above + start_position, 0])

    nearest = tl.full([BLOCK_M, TILE], NO_KEY, tl.int32)
    second = tl.full([BLOCK_M, TILE], NO_KEY, tl.int32)
    third = tl.full([BLOCK_M, TILE], NO_KEY, tl.int32)
    for step in range(0, steps):
        start = (share * steps + step) * BLOCK_N
        cols = start + tl.arange(0, BLOCK_N)
        if HELD:
            dot = tl.dot(left, cols_desc.load([cols_above + start, 0]).T)
        else:
            dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for d in range(0, padded_d, BLOCK_D):
                left = rows_desc.load([rows_above + start_position, d])
                dot = tl.dot(left, cols_desc.load([cols_above + start, d]).T, dot)
        c = (row_a2[:, None] + tl.load(col_a2_ptr + cols)[None, :]) - 2.0 * dot
        if EXCLUDE_SELF:
            if (start < start_position + BLOCK_M) & (start + BLOCK_N > start_position):
                c = tl.where(positions[:, None] == cols[None, :], float("inf"), c)
        # The bits of floats from 0 on order like the floats. Rounding makes some c negative, and
        # these come first.
        bits = c.to(tl.int32, bitcast=True)
        tile = step * (BLOCK_N // TILE)
        nearest, second, third = _fold(bits, tile, tile_mask, nearest, second, third)

    row = (image * rows_per_image + (positions - first)).to(tl.int64)
    bins_ptr += (row[:, None] * shares + share) * (DEPTH * TILE)
    out = bins_ptr + tl.arange(0, TILE)[None, :]
    tl.store(out, nearest)
    tl.store(out + TILE, second)
    tl.store(out + 2 * TILE, third)


def bins_launch(
    rows: Rounded,
    columns: Rounded,
    exclude_self: bool,
    bins: torch.Tensor,
    first: int,
    block_n: int,
) -> Launch:
    """Fills bins (B, R, shares, 3, 64) of the rows at first, ..., first + R - 1 of each image."""
    batch, rows_per_image, shares = bins.shape[:3]
    padded_n, padded_d = columns.padded_n, columns.padded_d
    assert rows_per_image % BLOCK_M == 0 and first % BLOCK_M == 0 and bins.is_contiguous()
    assert first + rows_per_image <= rows.padded_n and rows.padded_d == padded_d
    steps = padded_n // block_n // shares
    assert steps * shares * block_n == padded_n
    held = block_n == 128
    block_d = padded_d if held else 64
    flat_rows, flat_columns = rows.y.view(-1, padded_d), columns.y.view(-1, padded_d)
    return Launch(
        _bins_kernel,
        batch * (rows_per_image // BLOCK_M) * shares,
        rows_desc=TensorDescriptor.from_tensor(flat_rows, [BLOCK_M, block_d]),
        cols_desc=TensorDescriptor.from_tensor(flat_columns, [block_n, block_d]),
        row_a2_ptr=rows.a2,
        col_a2_ptr=columns.a2,
        bins_ptr=bins,
        first=first,
        rows_per_image=rows_per_image,
        padded_m=rows.padded_n,
        padded_n=padded_n,
        padded_d=padded_d,
        steps=steps,
        shares=shares,
        tile_mask=2 ** tile_bits(padded_n // shares) - 1,
        EXCLUDE_SELF=exclude_self,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        HELD=held,
        num_warps=8,
        num_stages=2 if held else 3,
    )


def block_columns(d: int, gpu: Architecture) -> int:
    """Columns a step of `bins`: 128 where the rows are held."""
    return gpu.options.bins_columns_held if d <= 256 else gpu.options.bins_columns


def tile_bits(columns: int) -> int:
    """The number of low bits of a key that number one of the tiles of the columns."""
    return (columns // TILE.value - 1).bit_length()
