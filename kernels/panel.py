"""Aggregation by panels: rows of the weights W are written, and W V is a second product.

    w_ij  = weight(s_ij) of `aggregate.py`           `weights`, into (B, R, columns)
    out_i = sum_j w_ij v_j / (total_i + eps)         `product`

W is symmetric. Where a panel holds all rows, `weights` computes the tiles on and below the diagonal
and writes each a second time, transposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import Architecture, Launch, architecture, strides

TILE = 128  # rows and columns of a program of `weights`

# Channels of half-precision features in one accumulator of a tensor core. What it truncates of the
# similarity of a token with itself, 4e-6 on H100 and 8e-6 on A100 by the emulation in
# tests/test_aggregate_kernels.py, must stay below the 2e-5 that a threshold leaves (`reference.
# content_floor`): of 4096 channels, it would not.
CHANNELS = 1024
_CHANNELS = tl.constexpr(CHANNELS)


class Operand(NamedTuple):
    """A tensor as the products read it: itself, or two float16 ones whose sum it is."""

    first: torch.Tensor
    second: torch.Tensor | None


@triton.jit
def weight_of(s, floor, gamma, SOFTMAX: tl.constexpr):
    """The weight of similarities, 0 below the floor; NaN stays NaN."""
    weight = tl.exp(gamma * (s - 1.0)) if SOFTMAX else s
    return tl.where(s < floor, 0.0, weight)


@triton.jit
def has_direction(scale):
    """Whether an inverse norm is that of a token with a direction: finite and above 0."""
    return (scale > 0.0) & (scale < float("inf"))


@triton.jit
def any_not_finite(x):
    """Whether a block [., .] holds a NaN or an infinity."""
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=1), axis=0) > 0


@triton.jit
def split_dot(a, a2, b, b2, acc, SPLIT: tl.constexpr):
    """acc + a b, or with SPLIT (a + a2) (b + b2) without the least of the four products.

    Tensor cores truncate their sums, so that the error of a sum grows with its length: in one
    accumulator throughout, it is 3e-5 of a float32 mean over 5184 tokens, 5e-4 over 82,944. With
    SPLIT, the products of one step, 64 tokens or channels, are summed by themselves and added to
    acc in float32, which rounds to nearest: below 1e-6 for any number of tokens. In half precision
    the same error is 4e-4 over 82,944 tokens on H100, 7e-4 on A100, about what rounding the result
    costs, and a second accumulator has no room beside tiles of 256 channels. (All by the emulation
    in tests/test_aggregate_kernels.py.)
    """
    if SPLIT:
        step = tl.dot(a2, b, tl.zeros(acc.shape, tl.float32))
        step = tl.dot(a, b2, step)
        return acc + tl.dot(a, b, step)
    return tl.dot(a, b, acc)


@triton.jit
def _load(ptrs, inside, WHOLE: tl.constexpr):
    return tl.load(ptrs) if WHOLE else tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def _add_channels(
    f_ptr,
    f2_ptr,
    row_offsets,
    col_offsets,
    start,
    stop,
    D,
    stride_fd,
    s,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """s and the products of the features' channels from `start` to `stop`."""
    for d in range(start, stop, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        depth = dims.to(tl.int64) * stride_fd
        fi = _load(f_ptr + row_offsets + depth[None, :], (dims < D)[None, :], WHOLE)
        fj = _load(f_ptr + col_offsets + depth[:, None], (dims < D)[:, None], WHOLE)
        fi2, fj2 = fi, fj
        if SPLIT:
            fi2 = _load(f2_ptr + row_offsets + depth[None, :], (dims < D)[None, :], WHOLE)
            fj2 = _load(f2_ptr + col_offsets + depth[:, None], (dims < D)[:, None], WHOLE)
        s = split_dot(fi, fi2, fj, fj2, s, SPLIT)
    return s


@triton.jit
def similarities(
    f_ptr,
    f2_ptr,
    row_offsets,
    col_offsets,
    D,
    stride_fd,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Products [ROWS, COLS] of the features at row_offsets [ROWS, 1] and col_offsets [1, COLS]."""
    s = tl.zeros([ROWS, COLS], tl.float32)
    if DEEP:
        for start in range(0, D, _CHANNELS):
            s += _add_channels(
                f_ptr,
                f2_ptr,
                row_offsets,
                col_offsets,
                start,
                tl.minimum(start + _CHANNELS, D),
                D,
                stride_fd,
                tl.zeros([ROWS, COLS], tl.float32),
                BLOCK_D,
                SPLIT,
                WHOLE,
            )
    else:
        s = _add_channels(
            f_ptr, f2_ptr, row_offsets, col_offsets, 0, D, D, stride_fd, s, BLOCK_D, SPLIT, WHOLE
        )
    return s


@triton.jit
def _tile_below_diagonal(pid):
    """Row and column of the pid-th tile of a lower triangle, row by row."""
    row = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where((row + 1) * (row + 2) // 2 <= pid, row + 1, row)  # where the root was rounded
    row = tl.where(row * (row + 1) // 2 > pid, row - 1, row)
    return row, pid - row * (row + 1) // 2


@triton.jit
def _grouped_tile(pid, down, across, GROUP: tl.constexpr):
    """Row and column of the pid-th tile, GROUP rows at a time: what they read is still cached."""
    top = pid // (GROUP * across) * GROUP
    height = tl.minimum(down - top, GROUP)
    return top + pid % (GROUP * across) % height, pid % (GROUP * across) // height


@triton.jit
def _store_weights(
    w_ptr, w2_ptr, sums_ptr, weight, sum_, rows, cols, R, columns, SPLIT: tl.constexpr
):
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
        i, j = _tile_below_diagonal(pid)
    else:
        i, j = _grouped_tile(pid, tl.cdiv(R, TILE), across, GROUP)
    local = i * TILE + tl.arange(0, TILE)
    rows, cols = first + local, j * TILE + tl.arange(0, TILE)
    # Loads beyond the tokens read the last: their weights are not used.
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
    # A token without a direction has no weight for others, and its own sum is NaN.
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
            sum_ = tl.where(col_has, tl.sum(weight, axis=0), float("nan"))
            weight = tl.trans(weight)
            _store_weights(
                w_ptr, w2_ptr, sums_ptr + i * R, weight, sum_, cols, local, R, columns, SPLIT
            )


@triton.jit
def _product_kernel(
    # tensors
    w_ptr,
    w2_ptr,
    v_ptr,
    v2_ptr,
    scale_ptr,
    total_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid = tl.program_id(0)
    slices = tl.cdiv(DV, BLOCK_V)
    down = tl.cdiv(R, BLOCK_M)
    image = (pid // (slices * down)).to(tl.int64)
    i, j = _grouped_tile(pid % (slices * down), down, slices, GROUP)
    local = i * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = j * BLOCK_V + tl.arange(0, BLOCK_V)
    row_offsets = (image * R + tl.minimum(local, R - 1)).to(tl.int64)[:, None] * columns
    v_offsets = image * stride_vb + channels.to(tl.int64)[None, :] * stride_vd  # [1, BLOCK_V]
    has = (channels < DV)[None, :]
    average = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, columns, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col = tl.minimum(cols, N - 1).to(tl.int64)[:, None] * stride_vn
        w = tl.load(w_ptr + row_offsets + cols[None, :])  # [BLOCK_M, BLOCK_N]
        v = _load(v_ptr + v_offsets + col, has, WHOLE)  # [BLOCK_N, BLOCK_V]
        w2, v2 = w, v
        if SPLIT:
            w2 = tl.load(w2_ptr + row_offsets + cols[None, :])
            v2 = _load(v2_ptr + v_offsets + col, has, WHOLE)
        average = split_dot(w, w2, v, v2, average, SPLIT)
    if not SPLIT:
        # 0 times NaN is NaN. A mask in the loop above would cost every call what few need.
        if any_not_finite(average):
            average = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            for start in range(0, columns, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                col = tl.minimum(cols, N - 1)
                col_has = has_direction(tl.load(scale_ptr + image * N + col))[:, None]
                w = tl.load(w_ptr + row_offsets + cols[None, :])
                v_ptrs = v_ptr + v_offsets + col.to(tl.int64)[:, None] * stride_vn
                average = tl.dot(w, tl.load(v_ptrs, mask=has & col_has, other=0.0), average)
    token = image * N + first + local
    exists = (local < R) & (first + local < N)
    total = tl.load(total_ptr + token, mask=exists, other=1.0)
    average = average / (total + eps)[:, None]
    tl.store(
        out_ptr + token[:, None] * DV + channels[None, :],
        average.to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & has,
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
    """Rows from `first` on of the weights (B, R, columns), and their sums (B, columns / 128, R)."""
    batch, n, d = f.first.shape
    rows, columns = panel.first.shape[1:]
    assert rows % TILE == columns % TILE == 0 and all(t.is_contiguous() for t in (scale, floor))
    split, across = f.second is not None, columns // TILE
    symmetric = rows == columns
    tiles = across * (across + 1) // 2 if symmetric else rows // TILE * across
    gpu = gpu or architecture(f.first.device)
    whole, deep = d % 64 == 0, d > CHANNELS and not split
    # Elsewhere, 64 split channels a step spill 464 bytes (sm_80, Triton 3.8).
    block_d = 16 if not whole else 64 if gpu.hopper or not split else 32
    return Launch(
        _weights_kernel,
        batch * tiles,
        dict(f_ptr=f.first, f2_ptr=f.second, scale_ptr=scale)
        | dict(floor_ptr=floor, w_ptr=panel.first, w2_ptr=panel.second)
        | dict(sums_ptr=sums, N=n, D=d, R=rows, columns=columns, first=first, tiles=tiles)
        | strides("f", f.first, "bnd")
        | dict(gamma=0.0 if gamma is None else gamma),
        dict(SOFTMAX=gamma is not None, SYMMETRIC=symmetric, SPLIT=split, WHOLE=whole)
        | dict(DEEP=deep, TILE=TILE, BLOCK_D=block_d, GROUP=8),
        dict(num_warps=4 if whole and not split and not deep else 8, num_stages=3),
    )


def product_launch(
    panel: Operand,
    v: Operand,
    scale: torch.Tensor,
    total: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    first: int,
    gpu: Architecture | None = None,
) -> Launch:
    """out (B, N, DV) of the rows of a panel; scale, total, out contiguous within an image."""
    batch, n, dv = v.first.shape
    rows, columns = panel.first.shape[1:]
    split = v.second is not None
    block_v = 128 if dv > 64 else 64
    gpu = gpu or architecture(out.device)
    return Launch(
        _product_kernel,
        batch * triton.cdiv(rows, 128) * triton.cdiv(dv, block_v),
        dict(w_ptr=panel.first, w2_ptr=panel.second)
        | dict(v_ptr=v.first, v2_ptr=v.second, scale_ptr=scale, total_ptr=total, out_ptr=out)
        | dict(N=n, DV=dv, R=rows, columns=columns, first=first)
        | dict(**strides("v", v.first, "bnd"), eps=eps),
        dict(SPLIT=split, WHOLE=dv % block_v == 0, BLOCK_M=128, BLOCK_V=block_v)
        | dict(BLOCK_N=32 if split and not gpu.hopper else 64, GROUP=8),
        dict(num_warps=8 if split else 4, num_stages=3 if split else 4),
    )
