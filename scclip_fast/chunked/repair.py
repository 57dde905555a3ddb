"""Repair of outlier tokens, and its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tiles
from .tiles import compute_dtype


def repair(tokens: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """`reference.repair` of tokens (B, N, D), without waiting for a GPU.

    Listing the few outliers is the least work but needs their number. A GPU would have to be waited
    for to count them, so there the windows of all tokens are summed.
    """
    rule = listed if tokens.device.type == "cpu" else pooled
    return rule(tokens, mask, grid)


def listed(tokens: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """`reference.repair` by the windows of the outliers alone, as many as fit the workspace."""
    height, width = grid
    image, token = mask.nonzero(as_tuple=True)
    window = torch.arange(-1, 2)
    rows = (token // width)[:, None, None] + window[:, None]  # (M, 3, 1)
    columns = (token % width)[:, None, None] + window  # (M, 1, 3)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    around = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    good = (inside & ~mask[image[:, None, None], around]).flatten(1)  # not the centre: an outlier
    count, around = good.sum(dim=1), around.flatten(1)
    repaired = tokens.clone(memory_format=torch.contiguous_format)
    bytes_each = 9 * max(1, tokens.shape[-1]) * tokens.itemsize
    for some in count.nonzero()[:, 0].split(max(1, tiles.WORKSPACE_BYTES // 4 // bytes_each)):
        source, kept = image[some, None], good[some]
        total = tokens[source, around[some]].masked_fill_(~kept.unsqueeze(-1), 0).sum(dim=1)
        repaired[source[:, 0], token[some]] = total / count[some, None]
    return repaired


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
