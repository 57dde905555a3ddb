"""Aggregation by panels: one kernel writes rows of the weights W, a second one multiplies W V.

    w_ij  = weight(s_ij) of `aggregate.py`           `weights`, into (B, R, columns)
    out_i = unit sum_j w_ij v_j / (total_i + eps)    `product`

W is symmetric. If a panel holds all rows, `weights` computes only the tiles on and below the
diagonal, and writes each one twice, the second time transposed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Architecture, Launch, architecture, cdiv, strides
from .._tiles import grouped_tile, tile_below_diagonal
from .products import (
    CHANNELS,
    Operand,
    any_not_finite,
    has_direction,
    load,
    similarities,
    split_dot,
    weight_of,
)

TILE = 128  # rows and columns of a program of `weights`


@triton.jit
def _store_weights(
    w_ptr, w2_ptr, sums_ptr, weight, sum_, rows, cols, R, columns, SPLIT: tl.constexpr
):
    """Stores a tile of the weights and the sums of its rows."""
    inside = (rows < R)[:, None] & (cols < columns)[None, :]
    offsets = rows.to(tl.int64)[:, None] * columns + cols[None, :]
    first = weight.to(w_ptr.dtype.element_ty)
    tl.store(w_ptr + offsets, first, mask=inside)
    if SPLIT:
        tl.store(w2_ptr + offsets, (weight - first).to(tl.float16), mask=inside)
    tl.store(sums_ptr + rows, sum_, mask=rows < R)


@triton.jit
def _weights_kernel(
    # tensors
    f_ptr,
    f2_ptr,
    scale_ptr,
    floor_ptr,
    w_ptr,
    w2_ptr,
    sums_ptr,
    # sizes
    N,
    D,
    R,
    columns,
    first,
    tiles,
    # strides
    stride_fb,
    stride_fn,
    stride_fd,
    # weights
    gamma,
    SOFTMAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    DEEP: tl.constexpr,
    # tile
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    pid = pid % tiles
    across = columns // TILE
    if SYMMETRIC:
        i, j = tile_below_diagonal(pid)
    else:
        i, j = grouped_tile(pid, tl.cdiv(R, TILE), across, GROUP)
    local = i * TILE + tl.arange(0, TILE)
    rows, cols = first + local, j * TILE + tl.arange(0, TILE)
    # Rows and columns beyond the tokens load the last one, whose weight is then not used.
    row, col = tl.minimum(rows, N - 1), tl.minimum(cols, N - 1)
    f_ptr += image * stride_fb
    if SPLIT:
        f2_ptr += image * stride_fb
    row_offsets = row.to(tl.int64)[:, None] * stride_fn  # [TILE, 1]
    col_offsets = col.to(tl.int64)[None, :] * stride_fn  # [1, TILE]
    s = similarities(
        f_ptr,
        f2_ptr,
        row_offsets,
        col_offsets,
        D,
        stride_fd,
        TILE,
        TILE,
        BLOCK_D,
        SPLIT,
        WHOLE,
        DEEP,
    )
    scale_ptr += image * N
    row_scale, col_scale = tl.load(scale_ptr + row), tl.load(scale_ptr + col)
    s = s * row_scale[:, None] * col_scale[None, :]
    weight = weight_of(s, tl.load(floor_ptr + image), gamma, SOFTMAX)
    # A token without a direction has weight 0 for the others, and its own sum is NaN.
    row_has, col_has = has_direction(row_scale), has_direction(col_scale)
    weight = tl.where(((cols < N) & col_has)[None, :], weight, 0.0)

    w_ptr += image * R * columns
    if SPLIT:
        w2_ptr += image * R * columns
    sums_ptr += image * across * R
    sum_ = tl.where(row_has, tl.sum(weight, axis=1), float("nan"))
    _store_weights(w_ptr, w2_ptr, sums_ptr + j * R, weight, sum_, local, cols, R, columns, SPLIT)
    if SYMMETRIC:
        if i != j:
            weight = tl.where(((rows < N) & row_has)[:, None], weight, 0.0)
            sum_ = tl.sum(weight, axis=0)
            weight = tl.trans(weight)
            _store_weights(
                w_ptr, w2_ptr, sums_ptr + i * R, weight, sum_, cols, local, R, columns, SPLIT
            )


def weights_launch(
    f: Operand,
    scale: torch.Tensor,
    floor: torch.Tensor,
    gamma: float | None,
    panel: Operand,
    sums: torch.Tensor,
    first: int,
    gpu: Architecture | None = None,
) -> Launch:
    """A panel of the weights (B, R, columns) from row `first` on, and its sums by tile.

    sums: (B, columns / 128, R), the sums of a row over each 128 columns.
    """
    batch, n, d = f.first.shape
    rows, columns = panel.first.shape[1:]
    assert rows % TILE == columns % TILE == 0 and all(t.is_contiguous() for t in (scale, floor))
    split, across = f.second is not None, columns // TILE
    symmetric = rows == columns
    tiles = across * (across + 1) // 2 if symmetric else rows // TILE * across
    gpu = gpu or architecture(f.first.device)
    whole, deep = d % 64 == 0, d > CHANNELS and not split
    return Launch(
        _weights_kernel,
        batch * tiles,
        f_ptr=f.first,
        f2_ptr=f.second,
        scale_ptr=scale,
        floor_ptr=floor,
        w_ptr=panel.first,
        w2_ptr=panel.second,
        sums_ptr=sums,
        N=n,
        D=d,
        R=rows,
        columns=columns,
        first=first,
        tiles=tiles,
        **strides("f", f.first, "bnd"),
        gamma=0.0 if gamma is None else gamma,
        SOFTMAX=gamma is not None,
        SYMMETRIC=symmetric,
        SPLIT=split,
        WHOLE=whole,
        DEEP=deep,
        TILE=TILE,
        BLOCK_D=16 if not whole else gpu.options.split_step if split else 64,
        GROUP=8,
        num_warps=4 if whole and not split and not deep else 8,
        num_stages=3,
    )


@triton.jit
def _product_kernel(
    # tensors
    w_ptr,
    w2_ptr,
    v_ptr,
    v2_ptr,
    scale_ptr,
    sums_ptr,
    total_ptr,
    unit_ptr,
    out_ptr,
    # sizes
    N,
    DV,
    R,
    columns,
    first,
    # strides
    stride_vb,
    stride_vn,
    stride_vd,
    eps,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    # tile
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid = tl.program_id(0)
    slices = tl.cdiv(DV, BLOCK_V)
    down = tl.cdiv(R, BLOCK_M)
    image = (pid // (slices * down)).to(tl.int64)
    i, j = grouped_tile(pid % (slices * down), down, slices, GROUP)
    local = i * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = j * BLOCK_V + tl.arange(0, BLOCK_V)
    row_offsets = (image * R + tl.minimum(local, R - 1)).to(tl.int64)[:, None] * columns
    v_offsets = image * stride_vb + channels.to(tl.int64)[None, :] * stride_vd  # [1, BLOCK_V]
    has_v = (channels < DV)[None, :]
    average = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, columns, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col = tl.minimum(cols, N - 1).to(tl.int64)[:, None] * stride_vn
        w = tl.load(w_ptr + row_offsets + cols[None, :])  # [BLOCK_M, BLOCK_N]
        v = load(v_ptr + v_offsets + col, has_v, WHOLE)  # [BLOCK_N, BLOCK_V]
        w2, v2 = w, v
        if SPLIT:
            w2 = tl.load(w2_ptr + row_offsets + cols[None, :])
            v2 = load(v2_ptr + v_offsets + col, has_v, WHOLE)
        average = split_dot(w, w2, v, v2, average, SPLIT)
    if not SPLIT:
        # 0 times NaN is NaN, so the product is repeated without the values of tokens that have no
        # direction. A mask in the loop above would slow every call for the sake of a few.
        if any_not_finite(average):
            average = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            for start in range(0, columns, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                col = tl.minimum(cols, N - 1)
                col_has = has_direction(tl.load(scale_ptr + image * N + col))[:, None]
                w = tl.load(w_ptr + row_offsets + cols[None, :])
                v_ptrs = v_ptr + v_offsets + col.to(tl.int64)[:, None] * stride_vn
                average = tl.dot(w, tl.load(v_ptrs, mask=has_v & col_has, other=0.0), average)
    token = image * N + first + local
    exists = (local < R) & (first + local < N)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first_tile in range(0, columns // TILE, 16):
        tile = first_tile + tl.arange(0, 16)
        sums_ptrs = sums_ptr + (image * (columns // TILE) + tile)[:, None] * R + local[None, :]
        inside = (tile < columns // TILE)[:, None] & (local < R)[None, :]
        total += tl.sum(tl.load(sums_ptrs, mask=inside, other=0.0), axis=0)
    if j == 0:
        tl.store(total_ptr + token, total, mask=exists)
    average = average / (total + eps)[:, None]
    if SPLIT:
        average *= tl.load(unit_ptr + image * DV + channels, mask=channels < DV, other=0.0)[None, :]
    tl.store(
        out_ptr + token[:, None] * DV + channels[None, :],
        average.to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & has_v,
    )


def product_launch(
    panel: Operand,
    v: Operand,
    scale: torch.Tensor,
    sums: torch.Tensor,
    total: torch.Tensor,
    unit: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    first: int,
    gpu: Architecture | None = None,
) -> Launch:
    """out (B, N, DV) and total (B, N) of the rows of a panel, from its sums by tile.

    unit: (B, 1, DV), the units of split values; None for others.
    """
    batch, n, dv = v.first.shape
    rows, columns = panel.first.shape[1:]
    assert all(t is None or t.is_contiguous() for t in (scale, sums, total, unit, out))
    split = v.second is not None
    block_v = 128 if dv > 64 else 64
    gpu = gpu or architecture(out.device)
    return Launch(
        _product_kernel,
        batch * cdiv(rows, 128) * cdiv(dv, block_v),
        w_ptr=panel.first,
        w2_ptr=panel.second,
        v_ptr=v.first,
        v2_ptr=v.second,
        scale_ptr=scale,
        sums_ptr=sums,
        total_ptr=total,
        unit_ptr=unit,
        out_ptr=out,
        N=n,
        DV=dv,
        R=rows,
        columns=columns,
        first=first,
        **strides("v", v.first, "bnd"),
        eps=eps,
        SPLIT=split,
        WHOLE=dv % block_v == 0,
        TILE=TILE,
        BLOCK_M=128,
        BLOCK_N=gpu.options.split_step if split else 64,
        BLOCK_V=block_v,
        GROUP=8,
        num_warps=8 if split else 4,
        num_stages=3 if split else 4,
    )
