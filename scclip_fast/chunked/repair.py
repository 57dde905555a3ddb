"""Repair of outlier tokens, and its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .tiles import compute_dtype


def repair(tokens: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """`reference.repair` of tokens (B, N, D), without waiting for a GPU.

    The reference lists the few outliers, which is the least work but needs their number. A GPU
    would have to be waited for to count them, so there the windows of all tokens are summed.
    """
    rule = reference.repair if tokens.device.type == "cpu" else pooled
    return rule(tokens, mask, grid)


def pooled(tokens: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """`reference.repair` by sums over 3 x 3 windows of the tokens that are no outliers.

    The centre of a window is an outlier wherever the result is used, so it adds nothing.
    """
    outlier = mask.unsqueeze(-1)
    count = _good_neighbors(mask, grid, tokens.dtype)
    mean = _window_sums(tokens.masked_fill(outlier, 0), grid) / count
    return torch.where(outlier & (count > 0), mean, tokens)


def repair_backward(grad: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Gradient of `repair` by the tokens (B, N, D).

    A replaced token passes its gradient to the tokens that it is the mean of, in equal shares.
    """
    dtype, outlier = compute_dtype(grad), mask.unsqueeze(-1)
    count = _good_neighbors(mask, grid, dtype)
    # Where count is 0, the share is infinite or NaN, but no good token lies in its window.
    shares = (grad / count).masked_fill_(~outlier, 0)
    received = _window_sums(shares, grid).masked_fill_(outlier, 0)
    received += grad.masked_fill(outlier & (count > 0), 0)
    return received.to(grad.dtype)


def _good_neighbors(mask: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The number of tokens that are no outliers in the 3 x 3 window of each token, (B, N, 1)."""
    return _window_sums((~mask).unsqueeze(-1).to(dtype), grid)


def _window_sums(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sums of tokens (B, N, C) over the 3 x 3 window of each token."""
    batch, n, width = tokens.shape
    image = tokens.reshape(batch, *grid, width).permute(0, 3, 1, 2)
    sums = F.avg_pool2d(image, kernel_size=3, stride=1, padding=1, divisor_override=1)
    return sums.reshape(batch, width, n).mT
