"""Replaces outlier tokens by the means of their good neighbours and copies the others, in one pass.

    out_i = mean {x_j : j beside i in the image, no outlier}        `reference.repair`

x (B, N, D), mask (B, N) bool -> out (B, N, D), in the dtype of x. A token inside the image has
eight neighbours, a corner three. If all of them are outliers, out_i = x_i. Only the neighbours of
outliers are read a second time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, cdiv, power_of_two, strides

# Numbers a program, 8 a thread. Where tokens are wide, a program has a single token, so that only
# the programs of outliers read neighbours.
TILE = 1024


@triton.jit
def _repair_kernel(
    # tensors
    x_ptr,
    mask_ptr,
    out_ptr,
    # sizes
    D,
    HEIGHT,
    WIDTH,
    # strides
    stride_xb,
    stride_xn,
    stride_xd,
    stride_mb,
    stride_mn,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    N = HEIGHT * WIDTH
    slices = tl.cdiv(D, BLOCK_D)
    blocks = tl.cdiv(N, BLOCK_R)
    image = (pid // (slices * blocks)).to(tl.int64)
    row = (pid // slices % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    dim = (pid % slices) * BLOCK_D + tl.arange(0, BLOCK_D)
    has_dim = (dim < D)[None, :]
    x_ptr += image * stride_xb + dim.to(tl.int64)[None, :] * stride_xd
    mask_ptr += image * stride_mb
    inside = row < N
    bad = tl.load(mask_ptr + row.to(tl.int64) * stride_mn, mask=inside, other=0)
    out = tl.load(
        x_ptr + row.to(tl.int64)[:, None] * stride_xn, mask=inside[:, None] & has_dim, other=0.0
    )  # [BLOCK_R, BLOCK_D]
    if tl.max(bad.to(tl.int32), axis=0) > 0:
        # The mask of all neighbours is loaded first, so that the loads of tokens wait for it once.
        around = tl.zeros([BLOCK_R], tl.int32)
        for place in tl.static_range(9):  # the outlier itself, in the middle, counts as bad
            y, x = row // WIDTH + (place // 3 - 1), row % WIDTH + (place % 3 - 1)
            there = bad & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
            other = (y * WIDTH + x).to(tl.int64) * stride_mn
            other_bad = tl.load(mask_ptr + other, mask=there, other=1)
            around |= tl.where(there & (other_bad == 0), 1 << place, 0)
        total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        count = tl.zeros([BLOCK_R], tl.float32)
        for place in tl.static_range(9):
            good = ((around >> place) & 1) == 1
            other = row + (place // 3 - 1) * WIDTH + (place % 3 - 1)
            neighbor = tl.load(
                x_ptr + other.to(tl.int64)[:, None] * stride_xn,
                mask=good[:, None] & has_dim,
                other=0.0,
            )
            total += neighbor.to(tl.float32)
            count += good.to(tl.float32)
        mean = tl.div_rn(total, tl.maximum(count, 1.0)[:, None])
        out = tl.where((count > 0)[:, None], mean.to(out.dtype), out)
    out_ptr += (image * N + row)[:, None] * D + dim[None, :]
    tl.store(out_ptr, out, mask=inside[:, None] & has_dim)


def repair_launch(
    x: torch.Tensor, mask: torch.Tensor, out: torch.Tensor, grid: tuple[int, int]
) -> Launch:
    """out (B, N, D), contiguous, from x and mask of any strides; grid = (height, width)."""
    batch, n, d = x.shape
    height, width = grid
    assert out.is_contiguous() and height * width == n
    # In a map with its channels first, one access to memory brings several tokens of a channel.
    block_d = power_of_two(d, 16, TILE if x.stride(2) <= x.stride(1) else 64)
    block_r = TILE // block_d
    return Launch(
        _repair_kernel,
        batch * cdiv(n, block_r) * cdiv(d, block_d),
        x_ptr=x,
        mask_ptr=mask,
        out_ptr=out,
        D=d,
        HEIGHT=height,
        WIDTH=width,
        **strides("x", x, "bnd"),
        **strides("m", mask, "bn"),
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
    )


def repair_triton(x: torch.Tensor, mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """out (B, N, D) of the module's equation; grid = (height, width)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    repair_launch(x, mask, out, grid).run()
    return out
