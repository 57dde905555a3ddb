"""Similarity-weighted means of the values, fused: similarities and weights never leave the chip.

    s_ij  = r_i r_j f_i f_j                          cosine similarity, r = 1 / ||f||
    w_ij  = 1[s_ij >= floor] s_ij                    SC-CLIP's aggregation, or
    w_ij  = 1[s_ij >= floor] exp(gamma (s_ij - 1))   (SOFTMAX) that of softmax(gamma (s_ij - mu))
    out_i = sum_j w_ij v_j / (sum_j w_ij + eps)

f (B, N, D), v (B, N, DV) any strides, r (B, N) and floor (B,) float32
-> out (B, N, DV), total (B, N) float32, the sums of the weights.

s <= 1 bounds the exponent, so the softmax needs no running maximum. The weights would be N^2
floats, 27.5 GB at N = 82,944; what is written here is out and total.

Each program owns BLOCK_M rows and BLOCK_V channels of the values and streams over all tokens.
Values wider than BLOCK_V cost the similarities once more per slice: one program cannot hold 1024
channels, as 64 x 1024 floats are a whole register file.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, dot_precision, power_of_two, strides


@triton.jit
def _aggregate_kernel(
    # tensors
    values_ptr,
    features_ptr,
    scale_ptr,
    floor_ptr,
    out_ptr,
    total_ptr,
    # sizes
    N,
    D,
    DV,
    # strides
    stride_vb,
    stride_vn,
    stride_vd,
    stride_fb,
    stride_fn,
    stride_fd,
    # weights
    gamma,
    eps,
    SOFTMAX: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    slices = tl.cdiv(DV, BLOCK_V)
    blocks = tl.cdiv(N, BLOCK_M)
    image = (pid // (slices * blocks)).to(tl.int64)
    rows = (pid // slices % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = (pid % slices) * BLOCK_V + tl.arange(0, BLOCK_V)
    features_ptr += image * stride_fb
    values_ptr += image * stride_vb + channels.to(tl.int64)[None, :] * stride_vd  # [1, BLOCK_V]
    row_ptrs = features_ptr + rows.to(tl.int64)[:, None] * stride_fn  # [BLOCK_M, 1]
    row_scale = tl.load(scale_ptr + image * N + rows, mask=rows < N, other=0.0)
    floor = tl.load(floor_ptr + image)

    average = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_ptrs = features_ptr + cols.to(tl.int64)[:, None] * stride_fn  # [BLOCK_N, 1]
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in range(0, D, BLOCK_D):
            dims = d + tl.arange(0, BLOCK_D)
            offsets = dims.to(tl.int64)[None, :] * stride_fd
            fi = tl.load(
                row_ptrs + offsets, mask=(rows < N)[:, None] & (dims < D)[None, :], other=0.0
            )
            fj = tl.load(
                col_ptrs + offsets, mask=(cols < N)[:, None] & (dims < D)[None, :], other=0.0
            )
            s = tl.dot(fi, tl.trans(fj), s, input_precision=PRECISION)
        col_scale = tl.load(scale_ptr + image * N + cols, mask=cols < N, other=0.0)
        s = s * row_scale[:, None] * col_scale[None, :]

        weight = tl.exp(gamma * (s - 1.0)) if SOFTMAX else s
        # [BLOCK_M, BLOCK_N]; NaN stays NaN
        weight = tl.where((s < floor) | (cols >= N)[None, :], 0.0, weight)
        total += tl.sum(weight, axis=1)
        v = tl.load(
            values_ptr + cols.to(tl.int64)[:, None] * stride_vn,
            mask=(cols < N)[:, None] & (channels < DV)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_V]
        average = tl.dot(weight.to(v.dtype), v, average, input_precision=PRECISION)

    average = average / (total + eps)[:, None]
    token = image * N + rows
    if pid % slices == 0:
        tl.store(total_ptr + token, total, mask=rows < N)
    out_ptrs = out_ptr + token[:, None] * DV + channels[None, :]
    tl.store(
        out_ptrs,
        average.to(out_ptr.dtype.element_ty),
        mask=(rows < N)[:, None] & (channels < DV)[None, :],
    )


def aggregate_launch(
    values: torch.Tensor,
    features: torch.Tensor,
    scale: torch.Tensor,
    floor: torch.Tensor,
    gamma: float | None,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor,
    precision: str | None = None,
) -> Launch:
    """The module's shapes; all but values and features contiguous."""
    batch, n, dv = values.shape
    assert all(t.is_contiguous() for t in (scale, floor, out, total))
    single = values.dtype == torch.float32 or features.dtype == torch.float32
    block_v = power_of_two(dv, 16, 64 if single else 128)
    return Launch(
        _aggregate_kernel,
        batch * triton.cdiv(n, 64) * triton.cdiv(dv, block_v),
        dict(
            values_ptr=values,
            features_ptr=features,
            scale_ptr=scale,
            floor_ptr=floor,
            out_ptr=out,
            total_ptr=total,
        )
        | dict(
            N=n,
            D=features.shape[-1],
            DV=dv,
            **strides("v", values, "bnd"),
            **strides("f", features, "bnd"),
        )
        | dict(gamma=0.0 if gamma is None else gamma, eps=eps),
        dict(
            SOFTMAX=gamma is not None,
            BLOCK_M=64,
            BLOCK_N=32 if single else 64,
            BLOCK_D=32 if single else 64,
        )
        | dict(BLOCK_V=block_v, PRECISION=precision or dot_precision()),
        dict(num_warps=4, num_stages=2),
    )


def aggregate_triton(
    values: torch.Tensor,
    features: torch.Tensor,
    scale: torch.Tensor,
    floor: torch.Tensor,
    gamma: float | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, total) of the module's equations; gamma=None for the thresholded similarity itself."""
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    total = torch.empty(values.shape[:2], dtype=torch.float32, device=values.device)
    aggregate_launch(
        values, features, scale.contiguous(), floor.contiguous(), gamma, eps, out, total
    ).run()
    return out, total
