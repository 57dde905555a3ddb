"""The mask of the scores above a quantile of their row, in one launch and without a sort.

    mask_i = s_i > lerp(s_(l), s_(u), r - l),  r = fraction (count - 1), l = floor r, u = ceil r

scores (B, N) float32 -> mask (B, N) bool       `reference.outlier_mask`

s_(0) <= s_(1) <= ... are the scores of a row without NaN, and count is their number. A program has
one row. The bits of float32 order like integers, so that s_(l) is found by bisection: each pass
over the row counts the scores up to three numbers and keeps a quarter of the integers, at most 16
times. The row comes from the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, power_of_two

NAN_KEY: tl.constexpr = tl.constexpr(2**31 - 1)  # above the key of +inf
LEAST_KEY: tl.constexpr = tl.constexpr(-(2**31))
MOST_SCORES = 8192  # of a step of a program, 32 a thread


@triton.jit
def _keys(scores_ptr, start, N, BLOCK_N: tl.constexpr):
    """Returns integers that order like the scores from `start` on; `NAN_KEY` for no score."""
    column = start + tl.arange(0, BLOCK_N)
    score = tl.load(scores_ptr + column, mask=column < N, other=float("nan"))
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(score == score, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), NAN_KEY)


@triton.jit
def _score_of(key):
    key = key.to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _count_up_to(count, keys, limit):
    return count + tl.sum((keys <= limit.to(tl.int32)).to(tl.int32), axis=0)


@triton.jit
def _outlier_mask_kernel(scores_ptr, mask_ptr, N, fraction, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * N
    mask_ptr += row * N
    count, low, high = 0, NAN_KEY, LEAST_KEY
    for start in range(0, N, BLOCK_N):
        keys = _keys(scores_ptr, start, N, BLOCK_N)
        is_score = keys < NAN_KEY
        count += tl.sum(is_score.to(tl.int32), axis=0)
        low = tl.minimum(low, tl.min(keys, axis=0))
        high = tl.maximum(high, tl.max(tl.where(is_score, keys, LEAST_KEY), axis=0))
    # The product of two numbers of float32 is exact in float64.
    rank = tl.maximum(count - 1, 0).to(tl.float64) * tl.cast(fraction, tl.float32).to(tl.float64)
    rank_below = tl.floor(rank)
    lower, upper = rank_below.to(tl.int32), tl.ceil(rank).to(tl.int32)

    low, high = low.to(tl.int64), high.to(tl.int64)  # the number of keys needs 33 bits
    while low < high:
        first = low + (high - low) // 4
        second = low + (high - low) // 2
        third = low + (high - low) * 3 // 4
        up_to_first, up_to_second, up_to_third = 0, 0, 0
        for start in range(0, N, BLOCK_N):
            keys = _keys(scores_ptr, start, N, BLOCK_N)
            up_to_first = _count_up_to(up_to_first, keys, first)
            up_to_second = _count_up_to(up_to_second, keys, second)
            up_to_third = _count_up_to(up_to_third, keys, third)
        if up_to_second > lower:
            high = tl.where(up_to_first > lower, first, second)
            low = tl.where(up_to_first > lower, low, first + 1)
        else:
            low = tl.where(up_to_third > lower, second + 1, third + 1)
            high = tl.where(up_to_third > lower, third, high)

    up_to_low, following = 0, NAN_KEY
    for start in range(0, N, BLOCK_N):
        keys = _keys(scores_ptr, start, N, BLOCK_N)
        up_to_low = _count_up_to(up_to_low, keys, low)
        following = tl.minimum(following, tl.min(tl.where(keys > low, keys, NAN_KEY), axis=0))
    below = _score_of(low)
    above = tl.where(up_to_low > upper, below, _score_of(following))
    weight = (rank - rank_below).to(tl.float32)
    # As `torch.lerp`, which rounds the product and the sum once.
    from_below = tl.fma(weight, above - below, below)
    from_above = tl.fma(weight - 1.0, above - below, above)
    quantile = tl.where(weight < 0.5, from_below, from_above)
    quantile = tl.where(tl.abs(quantile) < float("inf"), quantile, below)
    for start in range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        score = tl.load(scores_ptr + column, mask=column < N, other=0.0)
        tl.store(mask_ptr + column, score > quantile, mask=column < N)


def outlier_mask_launch(scores: torch.Tensor, mask: torch.Tensor, fraction: float) -> Launch:
    """The mask (B, N) bool of scores (B, N) float32 above their quantile; both are contiguous."""
    batch, n = scores.shape
    assert scores.is_contiguous() and mask.is_contiguous() and n + MOST_SCORES < 2**31
    return Launch(
        _outlier_mask_kernel,
        batch,
        scores_ptr=scores,
        mask_ptr=mask,
        N=n,
        fraction=fraction,
        BLOCK_N=power_of_two(n, 128, MOST_SCORES),
        num_warps=8,
    )


def outlier_mask_triton(scores: torch.Tensor, contamination: float) -> torch.Tensor:
    """The mask (B, N) bool of scores (B, N) float32 above the quantile 1 - contamination."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    outlier_mask_launch(scores.contiguous(), mask, 1 - contamination).run()
    return mask
