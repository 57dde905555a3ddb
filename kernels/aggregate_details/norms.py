"""Inverse norms of the features, and the features of norm `FEATURE_SCALE` in two halves.

    r_i = 1 / max(||f_i||, 1e-12),  NaN if ||f_i|| is not finite in float32
    f_i r_i FEATURE_SCALE = first + second        with SPLIT, fp16, to 22 bits

features (B, N, D) any strides -> r (B, N) float32. With SPLIT, first and second (B, N, D), and the
norms are 1 / `FEATURE_SCALE`, or NaN still.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch, cdiv, power_of_two, strides
from .products import Operand

FEATURE_SCALE = 64.0  # brings the second half of a unit feature into fp16's normal range
NORM_EPS: tl.constexpr = tl.constexpr(1e-12)  # the least norm, as in `reference.unit_vectors`
NUMBERS = 4096  # of a tile, 32 a thread; not measured yet


@triton.jit
def _norms_kernel(
    # tensors
    f_ptr,
    norms_ptr,
    first_ptr,
    second_ptr,
    # sizes
    N,
    D,
    # strides
    stride_fb,
    stride_fn,
    stride_fd,
    feature_scale,
    SPLIT: tl.constexpr,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_R)
    image = (pid // blocks).to(tl.int64)
    rows = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    token_ptrs = f_ptr + image * stride_fb + rows.to(tl.int64)[:, None] * stride_fn  # [BLOCK_R, 1]
    square = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (dims < D)[None, :]
        f_ptrs = token_ptrs + dims.to(tl.int64)[None, :] * stride_fd
        f = tl.load(f_ptrs, mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(f * f, axis=1)
    norm = tl.sqrt_rn(square)
    finite = norm < float("inf")
    inverse = tl.where(finite, tl.div_rn(1.0, tl.maximum(norm, NORM_EPS)), float("nan"))
    token = image * N + rows
    if SPLIT:
        left = tl.where(finite, 1.0 / feature_scale, float("nan"))
        tl.store(norms_ptr + token, left, mask=rows < N)
        factor = (inverse * feature_scale)[:, None]
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            inside = (rows < N)[:, None] & (dims < D)[None, :]
            f_ptrs = token_ptrs + dims.to(tl.int64)[None, :] * stride_fd
            scaled = tl.load(f_ptrs, mask=inside, other=0.0).to(tl.float32) * factor
            first = scaled.to(tl.float16)
            offsets = token[:, None] * D + dims[None, :]
            tl.store(first_ptr + offsets, first, mask=inside)
            tl.store(
                second_ptr + offsets, (scaled - first.to(tl.float32)).to(tl.float16), mask=inside
            )
    else:
        tl.store(norms_ptr + token, inverse, mask=rows < N)


def norms_launch(features: torch.Tensor, norms: torch.Tensor, halves: Operand | None) -> Launch:
    """Inverse norms (B, N), and the features (B, N, D) in halves unless these are None."""
    batch, n, d = features.shape
    first, second = (None, None) if halves is None else halves
    assert all(t is None or t.is_contiguous() for t in (norms, first, second))
    # In a map with its channels first, one access to memory brings several tokens of a channel.
    block_d = power_of_two(d, 16, 1024 if features.stride(2) <= features.stride(1) else 64)
    block_r = NUMBERS // block_d
    return Launch(
        _norms_kernel,
        batch * cdiv(n, block_r),
        f_ptr=features,
        norms_ptr=norms,
        first_ptr=first,
        second_ptr=second,
        N=n,
        D=d,
        **strides("f", features, "bnd"),
        feature_scale=FEATURE_SCALE,
        SPLIT=halves is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
        # Fused with the difference, the product would not be the float32 number that is split.
        enable_fp_fusion=False,
    )


def inverse_norms(features: torch.Tensor) -> torch.Tensor:
    """r (B, N) of the module's equation."""
    norms = torch.empty(features.shape[:2], dtype=torch.float32, device=features.device)
    norms_launch(features, norms, None).run()
    return norms


def split_features(features: torch.Tensor) -> tuple[Operand, torch.Tensor]:
    """The features divided by their norms in two halves, and the inverse norms of the halves."""
    norms = torch.empty(features.shape[:2], dtype=torch.float32, device=features.device)
    halves = Operand(*features.new_empty(2, *features.shape, dtype=torch.float16))
    norms_launch(features, norms, halves).run()
    return halves, norms
