"""Blended attention, fused: one pass of softmax attention that ends in the blend with the content.

    out = (1 - alpha) softmax(scale q k^T) v + alpha content

q, k (B, H, N, D), v, content (B, H, N, DV) any strides -> out (B, H, N, DV). The content
attention's weights are shared by all heads, so `aggregate` computes it once for the width H DV;
computing it in here would repeat its similarities per head.
The blend is the epilogue: no N x N scores and no second pass over the output.

Online softmax after Milakov and Gimelshein (arXiv 1805.02867) and FlashAttention-2 (arXiv
2307.08691), in base 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._launch import Launch, dot_precision, power_of_two, strides


@triton.jit
def _attention_kernel(
    # tensors
    q_ptr,
    k_ptr,
    v_ptr,
    content_ptr,
    out_ptr,
    # sizes
    H,
    N,
    D,
    DV,
    # strides
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_cb,
    stride_ch,
    stride_cn,
    stride_cd,
    # blend
    log2_scale,
    alpha,
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
    head = pid // (slices * blocks)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    rows = (pid // slices % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = (pid % slices) * BLOCK_V + tl.arange(0, BLOCK_V)
    q_ptr += b * stride_qb + h * stride_qh + rows.to(tl.int64)[:, None] * stride_qn  # [BLOCK_M, 1]
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += (
        b * stride_vb + h * stride_vh + channels.to(tl.int64)[None, :] * stride_vd
    )  # [1, BLOCK_V]
    content_ptr += (
        b * stride_cb + h * stride_ch + channels.to(tl.int64)[None, :] * stride_cd
    )  # [1, BLOCK_V]
    inside = (rows < N)[:, None] & (channels < DV)[None, :]

    average = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_ptrs = k_ptr + cols.to(tl.int64)[:, None] * stride_kn  # [BLOCK_N, 1]
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in range(0, D, BLOCK_D):
            dims = d + tl.arange(0, BLOCK_D)
            offsets = dims.to(tl.int64)[None, :]
            q = tl.load(
                q_ptr + offsets * stride_qd,
                mask=(rows < N)[:, None] & (dims < D)[None, :],
                other=0.0,
            )
            k = tl.load(
                col_ptrs + offsets * stride_kd,
                mask=(cols < N)[:, None] & (dims < D)[None, :],
                other=0.0,
            )
            s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
        s = tl.where((cols < N)[None, :], s * log2_scale, -float("inf"))

        above = tl.maximum(largest, tl.max(s, axis=1))
        weight = tl.exp2(s - above[:, None])  # [BLOCK_M, BLOCK_N]
        shrink = tl.exp2(largest - above)
        total = total * shrink + tl.sum(weight, axis=1)
        v = tl.load(
            v_ptr + cols.to(tl.int64)[:, None] * stride_vn,
            mask=(cols < N)[:, None] & (channels < DV)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_V]
        average = tl.dot(
            weight.to(v.dtype), v, average * shrink[:, None], input_precision=PRECISION
        )
        largest = above

    content = tl.load(
        content_ptr + rows.to(tl.int64)[:, None] * stride_cn, mask=inside, other=0.0
    ).to(tl.float32)
    out = (1.0 - alpha) * average / total[:, None] + alpha * content
    out_ptrs = out_ptr + (head.to(tl.int64) * N + rows)[:, None] * DV + channels[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


def attention_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    content: torch.Tensor,
    alpha: float,
    scale: float,
    out: torch.Tensor,
    precision: str | None = None,
) -> Launch:
    """The module's shapes; one dtype for q, k and v; out contiguous."""
    batch, heads, n, d = q.shape
    dv = v.shape[-1]
    assert out.is_contiguous()
    single = q.dtype == torch.float32
    block_v = power_of_two(dv, 16, 64 if single else 128)
    return Launch(
        _attention_kernel,
        batch * heads * triton.cdiv(n, 64) * triton.cdiv(dv, block_v),
        dict(q_ptr=q, k_ptr=k, v_ptr=v, content_ptr=content, out_ptr=out, H=heads, N=n, D=d, DV=dv)
        | strides("q", q, "bhnd")
        | strides("k", k, "bhnd")
        | strides("v", v, "bhnd")
        | strides("c", content, "bhnd")
        | dict(log2_scale=scale * math.log2(math.e), alpha=alpha),
        dict(
            BLOCK_M=64,
            BLOCK_N=32 if single else 64,
            BLOCK_D=32 if single else power_of_two(d, 16, 64),
        )
        | dict(BLOCK_V=block_v, PRECISION=precision or dot_precision()),
        dict(num_warps=4 if block_v <= 64 else 8, num_stages=2),
    )


def attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    content: torch.Tensor,
    alpha: float,
    scale: float,
) -> torch.Tensor:
    """out of the module's equation."""
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    attention_launch(q, k, v, content, alpha, scale, out).run()
    return out
