"""Similarities, their weights, and products of split operands, for `panel.py` and `stream.py`.

Tensor cores truncate their sums, so that the error of a sum grows with its length (`split_dot`,
`CHANNELS`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

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
    """True for the inverse norm of a token with a direction: finite and above 0."""
    return (scale > 0.0) & (scale < float("inf"))


@triton.jit
def any_not_finite(x):
    """True if a block [., .] holds a NaN or an infinity."""
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=1), axis=0) > 0


@triton.jit
def split_dot(a, a2, b, b2, acc, SPLIT: tl.constexpr):
    """acc + a b, or with SPLIT (a + a2) (b + b2) without the least of the four products.

    Tensor cores truncate their sums, so that the error of a sum grows with its length: in one
    accumulator throughout, it is 3e-5 of a float32 mean over 5184 tokens, 5e-4 over 82,944. With
    SPLIT, the products of one step, at most 64 tokens or channels, are summed by themselves and
    added to acc in float32, which rounds to nearest: below 1e-6 for any number of tokens. In half
    precision the same error is 4e-4 over 82,944 tokens on H100, 7e-4 on A100, about what rounding
    the result costs, and a second accumulator has no room beside tiles of 256 channels. (All by the
    emulation in tests/test_aggregate_kernels.py.)
    """
    if SPLIT:
        step = tl.dot(a2, b, tl.zeros(acc.shape, tl.float32))
        step = tl.dot(a, b2, step)
        return acc + tl.dot(a, b, step)
    return tl.dot(a, b, acc)


@triton.jit
def load(ptrs, inside, WHOLE: tl.constexpr):
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
        fi = load(f_ptr + row_offsets + depth[None, :], (dims < D)[None, :], WHOLE)
        fj = load(f_ptr + col_offsets + depth[:, None], (dims < D)[:, None], WHOLE)
        fi2, fj2 = fi, fj
        if SPLIT:
            fi2 = load(f2_ptr + row_offsets + depth[None, :], (dims < D)[None, :], WHOLE)
            fj2 = load(f2_ptr + col_offsets + depth[:, None], (dims < D)[:, None], WHOLE)
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
