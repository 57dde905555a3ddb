"""Repair of outlier tokens from their neighbours in the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import chunked, reference
from ..backend import resolve
from . import _check


def repair(
    tokens: Tensor, mask: Tensor, grid: tuple[int, int], *, backend: str | None = None
) -> Tensor:
    """Replace each outlier token by the mean of its 8 neighbours that are no outliers.

    An outlier without such a neighbour keeps its value (SC-CLIP's rule). Differentiable by
    `tokens`.

    Args:
        tokens: (N, D) or (B, N, D), floating, row by row: token i is patch (i // W, i % W).
        mask: bool, (N,) or (B, N), True for outliers; what `outlier_mask` returns.
        grid: (H, W) in patches, H W = N.
        backend: checked, and otherwise without effect: what is fastest depends on the device.

    Returns:
        A new tensor of the shape and dtype of `tokens`.

    Raises:
        TypeError: tokens is not floating or mask not bool.
        ValueError: shapes or devices that do not fit, H W other than N.
    """
    batch = _check.tokens("tokens", tokens)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True for outliers, got {found}")
    _check.shape("mask", mask, tuple(tokens.shape[:-1]), "(that of tokens without the last dim)")
    _check.same_device(tokens=tokens, mask=mask)
    grid = _check_grid(grid, batch.shape[1])
    outliers = mask.reshape(batch.shape[:2])
    resolve(backend, tokens)
    # Listing the few outliers is the least work, but a GPU would be waited for to count them, and
    # a graph would hold a size that is not known.
    listed = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    rule = reference.repair if listed else _pooled
    repaired = rule(batch.to(chunked.compute_dtype(batch)), outliers, grid)
    return repaired.to(tokens.dtype).view_as(tokens)


def _pooled(tokens: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The same rule by means over 3 x 3 windows of the good tokens, divided by their share.

    A window's own centre is an outlier wherever the result is used, so it counts for nothing.
    """
    image = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
    bad = mask.unflatten(1, grid).unsqueeze(1)
    good_sum = F.avg_pool2d(image.masked_fill(bad, 0), kernel_size=3, stride=1, padding=1)
    good_count = F.avg_pool2d((~bad).to(image.dtype), kernel_size=3, stride=1, padding=1)
    mean = good_sum / good_count.clamp(min=torch.finfo(image.dtype).tiny)
    replaced = (bad & (good_count > 0)).flatten(1).unsqueeze(-1)
    # Rows of tokens again, in memory too, for the kernels that read them next.
    return torch.where(replaced, mean.permute(0, 2, 3, 1).flatten(1, 2), tokens).contiguous()


def _check_grid(grid: tuple[int, int], n: int) -> tuple[int, int]:
    try:
        height, width = grid
    except (TypeError, ValueError):
        raise ValueError(f"grid must be (H, W) in patches, got {grid!r}") from None
    if height < 1 or width < 1 or height * width != n:
        raise ValueError(f"grid must be (H, W) with H * W = N, got {grid!r} for N={n} tokens")
    return height, width
