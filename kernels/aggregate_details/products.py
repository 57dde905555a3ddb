"""Similarities, their weights and split products, which `panel.py` and `stream.py` share.

Tensor cores truncate their sums, so that the error of a sum grows with its length. `split_dot` and
`CHANNELS` bound the length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Channels of half-precision features that one accumulator of a tensor core sums. It truncates the
# similarity of a token with itself by 4e-6 on H100 and 8e-6 on A100 (by the emulation in
# tests/test_aggregate_kernels.py). This must stay below 2e-5, the distance of the largest threshold
# from 1 (`reference.content_floor`); the truncation of 4096 channels would not.
CHANNELS = 1024
_CHANNELS = tl.constexpr(CHANNELS)


class Operand(NamedTuple):
    """An operand of a product: a tensor in half precision, or two whose sum is one in float32."""

    first: torch.Tensor
    second: torch.Tensor | None

    def images(self, some: slice) -> Operand:
        """The same operand of some images of the batch."""
        return Operand(*(half if half is None else half[some] for half in self))


@triton.jit
def weight_of(s, floor, gamma, SOFTMAX: tl.constexpr):
    """Returns the weights of similarities, 0 below the floor; NaN stays NaN."""
    weight = tl.exp(gamma * (s - 1.0)) if SOFTMAX else s
    return tl.where(s < floor, 0.0, weight)


@triton.jit
def has_direction(scale):
    """Returns whether inverse norms are those of tokens with a direction: finite and above 0."""
    return (scale > 0.0) & (scale < float("inf"))


@triton.jit
def any_not_finite(x):
    """Returns whether a block [., .] holds a NaN or an infinity."""
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=1), axis=0) > 0


@triton.jit
def split_dot(a, a2, b, b2, acc, SPLIT: tl.constexpr):
    """Returns acc + a b, or with SPLIT acc + (a + a2) (b + b2) less the smallest of four products.

    In one accumulator throughout, a float32 mean is off by 3e-5 over 5184 tokens and by 5e-4 over
    82,944. With SPLIT, the products of one step, at most 64 tokens or channels, are summed apart
    and added to acc in float32, which rounds to nearest: the error is below 1e-6 for any number of
    tokens. In half precision, the error over 82,944 tokens is 4e-4 on H100 and 7e-4 on A100, about
    that of rounding the result, and a second accumulator has no room beside tiles of 256 channels.
    (All by the emulation in tests/test_aggregate_kernels.py.)
    """
    if SPLIT:
        step = tl.dot(a2, b, tl.zeros(acc.shape, tl.float32))
        step = tl.dot(a, b2, step)
        return acc + tl.dot(a, b, step)
    return tl.dot(a, b, acc)


@triton.jit
def load(ptrs, inside, WHOLE: tl.constexpr):
    """Loads a tile, without a mask if WHOLE."""
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
    """Returns s plus the products of the features' channels from `start` to `stop`."""
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
    """Returns the products [ROWS, COLS] of features f_i f_j, not yet normalized.

    The features are at row_offsets [ROWS, 1] and col_offsets [1, COLS]. DEEP sums every `CHANNELS`
    channels apart.
    """
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
