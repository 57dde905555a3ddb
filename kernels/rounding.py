"""Half-precision tokens for the nearest neighbours, and what the rounding did to them.

    y_j = fp16(s (x_j - m))    a_j = ||y_j||    r_j = ||s (x_j - m) - y_j||
    u = max_j (r_j - eta) / a_j

x (B, N, D) any strides -> m (B, D) float32, y (B, padded N, padded D) float16, a^2 and r
(B, padded N) and u (B,) float32. s is a power of two that brings y well inside fp16's range.

m may be any point, as distances do not depend on it: the mean of a sample, without what is far from
the others. The tokens of each tile of 64 are stored rotated by a number that depends on the tile,
`position_of`: in an image whose width shares a factor with 64, the neighbours above and below would
else all come to the same bins (`candidates.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, power_of_two, strides

TILE: tl.constexpr = tl.constexpr(64)
LARGEST_HALF: tl.constexpr = tl.constexpr(65504.0)
FARTHEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)  # the largest float32
SAMPLE = 128  # tokens whose mean m is
ROWS = 64 if triton.knobs.runtime.interpret else 16  # of a program of `round`


@triton.jit
def _rotation(tile):
    return (tile * -1640531527) >> 26 & 63  # the top bits of a product with 2^32 / golden ratio


@triton.jit
def position_of(token):
    """Returns the position that a token is stored at; int32."""
    tile = token // TILE
    return tile * TILE + ((token % TILE + _rotation(tile)) & (TILE - 1))


@triton.jit
def token_at(position):
    """Returns the token that is stored at a position; int32."""
    tile = position // TILE
    return tile * TILE + ((position % TILE - _rotation(tile)) & (TILE - 1))


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
    rows = tl.arange(0, SAMPLE) * step
    offsets = rows.to(tl.int64)[:, None] * stride_xn + dims.to(tl.int64)[None, :] * stride_xd
    inside = (rows < N)[:, None] & (dims < D)[None, :]
    x = tl.load(x_ptr + image * stride_xb + offsets, mask=inside, other=0.0).to(tl.float32)
    used = inside & (tl.abs(x) <= FARTHEST)
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


@triton.jit(do_not_specialize=["N"])
def _round_kernel(
    # tensors
    x_ptr,
    mean_ptr,
    spread_ptr,
    half_ptr,
    square_ptr,
    error_ptr,
    ratio_ptr,
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
    rows = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ptrs = x_ptr + image * stride_xb + rows.to(tl.int64)[:, None] * stride_xn  # [BLOCK_R, 1]
    token = image * padded_n + position_of(rows)
    squares = tl.zeros([WIDTH], tl.float32)
    for d in range(0, D, WIDTH):
        channels = d + tl.arange(0, WIDTH)
        spread = tl.load(spread_ptr + image * D + channels, mask=channels < D, other=0.0)
        squares += spread * spread
    size = tl.sqrt(tl.sum(squares, axis=0) / D)
    size = tl.minimum(tl.maximum(size, 7.9e-31), 1.2e30)  # 2^-100 and 2^100
    # To a mean of 2^-6: elements 4 million times as large fit, and ones of 1/256 are normal.
    scale = tl.exp2(-6.0 - tl.floor(tl.log2(size) + 0.5))
    square = tl.zeros([BLOCK_R], tl.float32)
    error = tl.zeros([BLOCK_R], tl.float32)
    for d in range(0, padded_d, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (dims < D)[None, :]
        x = tl.load(row_ptrs + dims.to(tl.int64)[None, :] * stride_xd, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + image * D + dims, mask=dims < D, other=0.0)
        exact = tl.where(inside, (x.to(tl.float32) - mean[None, :]) * scale, 0.0)
        # Finite in any case: one token that is not must not reach the products of the others.
        held = tl.minimum(tl.maximum(exact, -LARGEST_HALF), LARGEST_HALF)
        half = tl.where(exact == exact, held, 0.0).to(tl.float16)
        tl.store(half_ptr + token[:, None] * padded_d + dims[None, :], half)
        y = half.to(tl.float32)
        square += tl.sum(y * y, axis=1)
        error += tl.sum((exact - y) * (exact - y), axis=1)
    # The second term is the rounding of x - m.
    length = tl.sqrt(square)
    error = tl.sqrt(error) * 1.001 + length * 2.0**-22
    usable = (rows < N) & (error <= FARTHEST) & (square <= FARTHEST)
    tl.store(square_ptr + token, tl.where(usable, square, float("inf")))
    tl.store(error_ptr + token, tl.where(usable, error, 0.0))
    share = tl.maximum(error - eta, 0.0) / tl.maximum(length, 1.2e-38) * (1 + 2.0**-20)
    largest = tl.max(tl.where(usable, share, 0.0), axis=0)
    tl.atomic_max(ratio_ptr + image, largest.to(tl.int32, bitcast=True))  # in order from 0 on


def centre_launch(x: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor) -> Launch:
    """x (B, N, D) to mean and mean absolute deviation (B, D) of a sample of the tokens."""
    batch, n, d = x.shape
    assert mean.is_contiguous() and spread.is_contiguous()
    return Launch(
        _centre_kernel,
        batch * triton.cdiv(d, 32),
        dict(x_ptr=x, mean_ptr=mean, spread_ptr=spread, N=n, D=d, step=max(1, n // SAMPLE))
        | strides("x", x, "bnd"),
        dict(SAMPLE=SAMPLE, BLOCK_D=32),
        dict(num_warps=4),
    )


def round_launch(
    x: torch.Tensor,
    mean: torch.Tensor,
    spread: torch.Tensor,
    half: torch.Tensor,
    square: torch.Tensor,
    error: torch.Tensor,
    ratio: torch.Tensor,
) -> Launch:
    """The module's shapes; ratio is u (B,), zeros, read as int32."""
    batch, n, d = x.shape
    padded_n, padded_d = half.shape[1:]
    assert padded_n % TILE.value == 0 and padded_d % 64 == 0 and half.is_contiguous()
    return Launch(
        _round_kernel,
        batch * (padded_n // ROWS),
        dict(x_ptr=x, mean_ptr=mean, spread_ptr=spread, half_ptr=half, square_ptr=square)
        | dict(error_ptr=error, ratio_ptr=ratio.view(torch.int32), N=n, D=d, eta=eta(d))
        | dict(padded_n=padded_n, padded_d=padded_d, **strides("x", x, "bnd")),
        dict(BLOCK_R=ROWS, BLOCK_D=64, WIDTH=power_of_two(d, 16, 2048)),
        dict(num_warps=4),
    )


def positions(n: int) -> torch.Tensor:
    """Host copy of `position_of` for the tokens 0, ..., n - 1, for tests and benchmarks."""
    token = torch.arange(n)
    tile = token // TILE.value
    return tile * TILE.value + (token + (tile * 2654435769 % 2**32 >> 26)) % TILE.value


def eta(d: int) -> float:
    """Returns the most that fp16 loses below its normal range, over d channels."""
    return d**0.5 * 2.0**-25
