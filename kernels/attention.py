"""Blended attention: one pass of softmax attention that ends in the blend with the content.

    out = (1 - alpha) softmax(scale q k^T) v + alpha content

q, k (B, H, N, D), v, content (B, H, N, DV) any strides -> out (B, H, N, DV). The content
attention's weights are shared by all heads, so `aggregate.py` computes the content once, H DV wide;
this kernel would repeat its similarities for each head. The blend is the epilogue, so that there
are no N x N scores in memory and there is no second pass over the output.

Online softmax after Milakov and Gimelshein (arXiv 1805.02867) and FlashAttention-2 (arXiv
2307.08691), in base 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._launch import Architecture, Launch, architecture, cdiv, power_of_two, strides

# The widest head whose queries fit registers and shared memory beside a tile of keys and values.
MAX_WIDTH = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}


@triton.jit
def _attend(s, v, average, total, largest, PRECISION: tl.constexpr):
    """Adds a tile to the online softmax: scores s [BLOCK_M, BLOCK_N] in base 2, v [BLOCK_N, .].

    Triton sums the three tf32 products of a float32 step from zero and adds them to `average` in
    float32, so that what tensor cores truncate does not grow with the number of tokens.
    """
    above = tl.maximum(largest, tl.max(s, axis=1))
    weight = tl.exp2(s - above[:, None])
    shrink = tl.exp2(largest - above)
    total = total * shrink + tl.sum(weight, axis=1)
    average = average * shrink[:, None]
    average = tl.dot(weight.to(v.dtype), v, average, input_precision=PRECISION)
    return average, total, above


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
    WHOLE: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_M)
    head = pid // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    rows = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    channels = tl.arange(0, BLOCK_V)
    has_d, has_v = dims < D, channels < DV
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    content_ptr += b * stride_cb + h * stride_ch
    row = tl.minimum(rows, N - 1).to(tl.int64)[:, None]  # rows beyond the tokens load the last one
    q = tl.load(
        q_ptr + row * stride_qn + dims.to(tl.int64)[None, :] * stride_qd,
        mask=has_d[None, :],
        other=0.0,
    )
    k_offsets = dims.to(tl.int64)[:, None] * stride_kd  # [BLOCK_D, 1]
    v_offsets = channels.to(tl.int64)[None, :] * stride_vd  # [1, BLOCK_V]

    average = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    cols = tl.arange(0, BLOCK_N)
    k_ptrs = k_ptr + cols.to(tl.int64)[None, :] * stride_kn + k_offsets  # [BLOCK_D, BLOCK_N]
    v_ptrs = v_ptr + cols.to(tl.int64)[:, None] * stride_vn + v_offsets  # [BLOCK_N, BLOCK_V]
    k_step = tl.cast(stride_kn, tl.int64) * BLOCK_N
    v_step = tl.cast(stride_vn, tl.int64) * BLOCK_N
    whole = N // BLOCK_N * BLOCK_N
    for _ in range(0, whole, BLOCK_N):
        k = tl.load(k_ptrs) if WHOLE else tl.load(k_ptrs, mask=has_d[:, None], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * log2_scale
        v = tl.load(v_ptrs) if WHOLE else tl.load(v_ptrs, mask=has_v[None, :], other=0.0)
        average, total, largest = _attend(s, v, average, total, largest, PRECISION)
        k_ptrs += k_step
        v_ptrs += v_step
    if whole < N:
        exists = whole + cols < N
        k = tl.load(k_ptrs, mask=exists[None, :] & has_d[:, None], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * log2_scale
        s = tl.where(exists[None, :], s, -float("inf"))
        v = tl.load(v_ptrs, mask=exists[:, None] & has_v[None, :], other=0.0)
        average, total, largest = _attend(s, v, average, total, largest, PRECISION)

    content = tl.load(
        content_ptr + row * stride_cn + channels.to(tl.int64)[None, :] * stride_cd,
        mask=has_v[None, :],
        other=0.0,
    ).to(tl.float32)
    out = (1.0 - alpha) * average / total[:, None] + alpha * content
    out_ptrs = out_ptr + (head.to(tl.int64) * N + rows)[:, None] * DV + channels[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & has_v[None, :])


def attention_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    content: torch.Tensor,
    alpha: float,
    scale: float,
    out: torch.Tensor,
    gpu: Architecture | None = None,
) -> Launch:
    """out (B, H, N, DV), contiguous; q, k and v have one dtype."""
    batch, heads, n, d = q.shape
    dv = v.shape[-1]
    assert out.is_contiguous() and max(d, dv) <= MAX_WIDTH[q.dtype]
    block_d, block_v = power_of_two(d, 16, 128), power_of_two(dv, 16, 128)
    gpu = gpu or architecture(q.device)
    block_m, block_n = gpu.options.attention_tile if q.dtype == torch.float32 else (128, 64)
    return Launch(
        _attention_kernel,
        batch * heads * cdiv(n, block_m),
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        content_ptr=content,
        out_ptr=out,
        H=heads,
        N=n,
        D=d,
        DV=dv,
        **strides("q", q, "bhnd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        **strides("c", content, "bhnd"),
        log2_scale=scale * math.log2(math.e),
        alpha=alpha,
        WHOLE=(d, dv) == (block_d, block_v),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        PRECISION=gpu.options.float32_products,
        num_warps=8,
        num_stages=3,
    )


def attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    content: torch.Tensor,
    alpha: float,
    scale: float,
) -> torch.Tensor:
    """out (B, H, N, DV) of the module's equation, for heads up to `MAX_WIDTH` wide."""
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    attention_launch(q, k, v, content, alpha, scale, out).run()
    return out
