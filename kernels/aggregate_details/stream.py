"""Aggregation in one pass, for so many tokens that few rows of the weights would fit the workspace.

The equations are those of `aggregate.py`. As s <= 1 bounds the exponent, the softmax needs no
running maximum.

Each program owns BLOCK_M rows and BLOCK_V channels of the values and streams over all tokens.
Values wider than BLOCK_V cost the similarities once more for each slice of channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Architecture, Launch, architecture, cdiv, power_of_two, strides
from .products import (
    CHANNELS,
    Operand,
    any_not_finite,
    has_direction,
    similarities,
    split_dot,
    weight_of,
)


@triton.jit
def _stream_kernel(
    # tensors
    f_ptr,
    f2_ptr,
    v_ptr,
    v2_ptr,
    scale_ptr,
    floor_ptr,
    unit_ptr,
    out_ptr,
    total_ptr,
    # sizes
    N,
    D,
    DV,
    # strides
    stride_fb,
    stride_fn,
    stride_fd,
    stride_vb,
    stride_vn,
    stride_vd,
    # weights
    gamma,
    eps,
    SOFTMAX: tl.constexpr,
    SPLIT: tl.constexpr,
    HELD: tl.constexpr,
    DEEP: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid = tl.program_id(0)
    slices = tl.cdiv(DV, BLOCK_V)
    blocks = tl.cdiv(N, BLOCK_M)
    image = (pid // (slices * blocks)).to(tl.int64)
    rows = (pid // slices % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = (pid % slices) * BLOCK_V + tl.arange(0, BLOCK_V)
    has_v = (channels < DV)[None, :]
    v_offsets = image * stride_vb + channels.to(tl.int64)[None, :] * stride_vd  # [1, BLOCK_V]
    # Rows and columns beyond the tokens load the last one, whose weight is then not used.
    row = tl.minimum(rows, N - 1)
    row_offsets = image * stride_fb + row.to(tl.int64)[:, None] * stride_fn  # [BLOCK_M, 1]
    scale_ptr += image * N
    row_scale = tl.load(scale_ptr + row)
    floor = tl.load(floor_ptr + image)
    if HELD:  # one block of channels holds the rows' features, which are not split
        dims = tl.arange(0, BLOCK_D)
        depth = dims.to(tl.int64) * stride_fd
        fi = tl.load(f_ptr + row_offsets + depth[None, :], mask=(dims < D)[None, :], other=0.0)

    average = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # 0 times NaN is NaN, so an average that is not finite is computed again, without the values of
    # tokens that have no direction. A mask in the first turn would slow every call.
    wanted = True
    for MASKED in tl.static_range(1 if SPLIT else 2):
        if wanted:
            average = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            for start in range(0, N, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                col = tl.minimum(cols, N - 1)
                col_offsets = image * stride_fb + col.to(tl.int64)[None, :] * stride_fn
                if HELD:
                    fj_ptrs = f_ptr + col_offsets + depth[:, None]
                    fj = tl.load(fj_ptrs, mask=(dims < D)[:, None], other=0.0)
                    s = tl.dot(fi, fj, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
                else:
                    s = similarities(
                        f_ptr,
                        f2_ptr,
                        row_offsets,
                        col_offsets,
                        D,
                        stride_fd,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_D,
                        SPLIT,
                        False,
                        DEEP,
                    )
                col_scale = tl.load(scale_ptr + col)
                col_has = has_direction(col_scale)
                s = s * row_scale[:, None] * col_scale[None, :]
                weight = weight_of(s, floor, gamma, SOFTMAX)
                weight = tl.where(((cols < N) & col_has)[None, :], weight, 0.0)
                total += tl.sum(weight, axis=1)
                offsets = v_offsets + col.to(tl.int64)[:, None] * stride_vn
                used = has_v & col_has[:, None] if MASKED else has_v
                v = tl.load(v_ptr + offsets, mask=used, other=0.0)  # [BLOCK_N, BLOCK_V]
                w = weight.to(v.dtype)
                w2, v2 = w, v
                if SPLIT:
                    v2 = tl.load(v2_ptr + offsets, mask=has_v, other=0.0)
                    w2 = (weight - w).to(v.dtype)
                average = split_dot(w, w2, v, v2, average, SPLIT)
        wanted = any_not_finite(average)

    total = tl.where(has_direction(row_scale), total, float("nan"))
    average = average / (total + eps)[:, None]
    if SPLIT:
        average *= tl.load(unit_ptr + image * DV + channels, mask=channels < DV, other=0.0)[None, :]
    token = image * N + rows
    if pid % slices == 0:
        tl.store(total_ptr + token, total, mask=rows < N)
    tl.store(
        out_ptr + token[:, None] * DV + channels[None, :],
        average.to(out_ptr.dtype.element_ty),
        mask=(rows < N)[:, None] & has_v,
    )


def stream_launch(
    v: Operand,
    f: Operand,
    scale: torch.Tensor,
    floor: torch.Tensor,
    unit: torch.Tensor | None,
    gamma: float | None,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor,
    gpu: Architecture | None = None,
) -> Launch:
    """out and total of `aggregate.py`; all tensors but values and features are contiguous."""
    batch, n, dv = v.first.shape
    d = f.first.shape[-1]
    assert all(t is None or t.is_contiguous() for t in (scale, floor, unit, out, total))
    split = f.second is not None
    held = d <= 256 and not split  # both halves would leave no room
    gpu = gpu or architecture(out.device)
    # Split operands take two accumulators in registers. Beside held rows, 256 channels of the
    # values take 104 KiB of shared memory.
    narrow = split or (held and gpu.shared < 128 * 1024)
    block_v = power_of_two(dv, 16, 128 if narrow else 256)
    return Launch(
        _stream_kernel,
        batch * cdiv(n, 128) * cdiv(dv, block_v),
        f_ptr=f.first,
        f2_ptr=f.second,
        v_ptr=v.first,
        v2_ptr=v.second,
        scale_ptr=scale,
        floor_ptr=floor,
        unit_ptr=unit,
        out_ptr=out,
        total_ptr=total,
        N=n,
        D=d,
        DV=dv,
        **strides("f", f.first, "bnd"),
        **strides("v", v.first, "bnd"),
        gamma=0.0 if gamma is None else gamma,
        eps=eps,
        SOFTMAX=gamma is not None,
        SPLIT=split,
        HELD=held,
        DEEP=d > CHANNELS and not split,
        BLOCK_M=128,
        BLOCK_N=32 if held else gpu.options.stream_tokens,
        BLOCK_D=power_of_two(d, 16, 256 if held else 64),
        BLOCK_V=block_v,
        num_warps=8,
        num_stages=2 if split else 3,
    )
