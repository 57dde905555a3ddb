"""Half-precision tokens for the nearest neighbours, with bounds on the error of their rounding.

    y_j = fp16(s (x_j - m))    a_j = ||y_j||    r_j = ||s (x_j - m) - y_j||
    u = max_j (r_j - eta) / a_j

x (B, N, D) any strides -> m (B, D) float32 by `centre`, and by `round` the tensors of
`table.Rounded`. s is a power of two that brings y well inside fp16's range. Where rows and columns
differ, `round` runs once for each set, with the columns' m and s for both.

m may be any point, as distances do not depend on it: the mean of a sample, without what is far from
the others. The tokens of each tile of 64 are stored rotated by a number that depends on the tile
(`table.position_of`): in an image whose width shares a factor with 64, the neighbours above and
below would otherwise all meet in the same bins (`bins.py`) or groups (`select.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch, cdiv, power_of_two, strides
from .table import LARGEST_FLOAT, TILE, Rounded, position_of

LARGEST_HALF: tl.constexpr = tl.constexpr(65504.0)
SAMPLE = 128  # tokens whose mean m is
ROWS = 64 if triton.knobs.runtime.interpret else 16  # of a program of `round`


@triton.jit(do_not_specialize=["N", "step"])
def _centre_kernel(
    # tensors
    x_ptr,
    mean_ptr,
    spread_ptr,
    # sizes
    N,
    D,
    step,
    # strides
    stride_xb,
    stride_xn,
    stride_xd,
    # tile
    SAMPLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BLOCK_D)
    image = (pid // blocks).to(tl.int64)
    dims = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    tokens = tl.arange(0, SAMPLE) * step
    offsets = tokens.to(tl.int64)[:, None] * stride_xn + dims.to(tl.int64)[None, :] * stride_xd
    inside = (tokens < N)[:, None] & (dims < D)[None, :]
    x = tl.load(x_ptr + image * stride_xb + offsets, mask=inside, other=0.0).to(tl.float32)
    used = inside & (tl.abs(x) <= LARGEST_FLOAT)
    x = tl.where(used, x, 0.0)
    count = tl.maximum(tl.sum(used.to(tl.float32), axis=0), 1.0)
    mean = tl.sum(x / count[None, :], axis=0)
    deviation = tl.zeros([SAMPLE, BLOCK_D], tl.float32)
    for _ in range(2):  # vision transformers have tokens a hundred times as long as the others
        deviation = tl.where(used, tl.abs(x - mean[None, :]), 0.0)
        typical = tl.sum(deviation / count[None, :], axis=0)
        used = used & (deviation <= 3.0 * typical[None, :])
        count = tl.maximum(tl.sum(used.to(tl.float32), axis=0), 1.0)
        mean = tl.sum(tl.where(used, x, 0.0) / count[None, :], axis=0)
    spread = tl.sum(tl.where(used, tl.abs(x - mean[None, :]), 0.0) / count[None, :], axis=0)
    tl.store(mean_ptr + image * D + dims, mean, mask=dims < D)
    tl.store(spread_ptr + image * D + dims, spread, mask=dims < D)


def centre_launch(x: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor) -> Launch:
    """x (B, N, D) -> mean and mean absolute deviation (B, D) of a sample of the tokens."""
    batch, n, d = x.shape
    assert mean.is_contiguous() and spread.is_contiguous()
    return Launch(
        _centre_kernel,
        batch * cdiv(d, 32),
        x_ptr=x,
        mean_ptr=mean,
        spread_ptr=spread,
        N=n,
        D=d,
        step=max(1, n // SAMPLE),
        **strides("x", x, "bnd"),
        SAMPLE=SAMPLE,
        BLOCK_D=32,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["N"])
def _round_kernel(
    # tensors
    x_ptr,
    mean_ptr,
    spread_ptr,
    y_ptr,
    a2_ptr,
    r_ptr,
    u_ptr,
    # sizes
    N,
    D,
    padded_n,
    padded_d,
    eta,
    # strides
    stride_xb,
    stride_xn,
    stride_xd,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = padded_n // BLOCK_R
    image = (pid // blocks).to(tl.int64)
    tokens = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    token_ptrs = x_ptr + image * stride_xb + tokens.to(tl.int64)[:, None] * stride_xn
    position = image * padded_n + position_of(tokens)
    squares = tl.zeros([WIDTH], tl.float32)
    for d in range(0, D, WIDTH):
        channels = d + tl.arange(0, WIDTH)
        spread = tl.load(spread_ptr + image * D + channels, mask=channels < D, other=0.0)
        squares += spread * spread
    size = tl.sqrt(tl.sum(squares, axis=0) / D)
    size = tl.minimum(tl.maximum(size, 7.9e-31), 1.2e30)  # 2^-100 and 2^100
    # To a mean of 2^-6: elements 4 million times as large fit, and ones of 1/256 are normal.
    s = tl.exp2(-6.0 - tl.floor(tl.log2(size) + 0.5))
    a2 = tl.zeros([BLOCK_R], tl.float32)
    r = tl.zeros([BLOCK_R], tl.float32)
    for d in range(0, padded_d, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        inside = (tokens < N)[:, None] & (dims < D)[None, :]
        x = tl.load(token_ptrs + dims.to(tl.int64)[None, :] * stride_xd, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + image * D + dims, mask=dims < D, other=0.0)
        exact = tl.where(inside, (x.to(tl.float32) - mean[None, :]) * s, 0.0)
        # y is finite in any case, so that a token that is not leaves the others' products alone.
        clamped = tl.minimum(tl.maximum(exact, -LARGEST_HALF), LARGEST_HALF)
        half = tl.where(exact == exact, clamped, 0.0).to(tl.float16)
        tl.store(y_ptr + position[:, None] * padded_d + dims[None, :], half)
        y = half.to(tl.float32)
        a2 += tl.sum(y * y, axis=1)
        r += tl.sum((exact - y) * (exact - y), axis=1)
    # The second term is the rounding of x - m.
    a = tl.sqrt(a2)
    r = tl.sqrt(r) * 1.001 + a * 2.0**-22
    usable = (tokens < N) & (r <= LARGEST_FLOAT) & (a2 <= LARGEST_FLOAT)
    tl.store(a2_ptr + position, tl.where(usable, a2, float("inf")))
    tl.store(r_ptr + position, tl.where(usable, r, 0.0))
    u = tl.maximum(r - eta, 0.0) / tl.maximum(a, 1.2e-38) * (1 + 2.0**-20)
    u = tl.max(tl.where(usable, u, 0.0), axis=0)
    tl.atomic_max(u_ptr + image, u.to(tl.int32, bitcast=True))  # bits order like floats from 0 on


def round_launch(
    x: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor, rounded: Rounded
) -> Launch:
    """Fills `rounded`, whose u must be zeros."""
    batch, n, d = x.shape
    padded_n, padded_d = rounded.padded_n, rounded.padded_d
    assert padded_n % TILE.value == 0 and padded_d % 64 == 0 and rounded.y.is_contiguous()
    assert (rounded.n, rounded.d) == (n, d)
    return Launch(
        _round_kernel,
        batch * (padded_n // ROWS),
        x_ptr=x,
        mean_ptr=mean,
        spread_ptr=spread,
        y_ptr=rounded.y,
        a2_ptr=rounded.a2,
        r_ptr=rounded.r,
        u_ptr=rounded.u.view(torch.int32),
        N=n,
        D=d,
        eta=eta(d),
        padded_n=padded_n,
        padded_d=padded_d,
        **strides("x", x, "bnd"),
        BLOCK_R=ROWS,
        BLOCK_D=64,
        WIDTH=power_of_two(d, 16, 2048),
        num_warps=4,
    )


def eta(d: int) -> float:
    """Returns the most that fp16 loses below its normal range, over d channels."""
    return d**0.5 * 2.0**-25
