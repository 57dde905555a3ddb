"""Repair of outlier tokens from their neighbours in the image."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import chunked, reference
from ..backend import NAMESPACE, operands, resolve
from . import _check


@torch.library.custom_op(f"{NAMESPACE}::repair", mutates_args=())
def _repair(tokens: Tensor, mask: Tensor, height: int, width: int, backend: str) -> Tensor:
    """`reference.repair`: (B, N, D), contiguous."""
    if backend == "triton":
        from ..kernels.repair import repair_triton

        return repair_triton(tokens, mask, (height, width))
    # Listing the few outliers is the least work, but a GPU would be waited for to count them.
    listed = backend == "reference" or tokens.device.type == "cpu"
    rule = reference.repair if listed else _pooled
    repaired = rule(tokens.to(chunked.compute_dtype(tokens)), mask, (height, width))
    return repaired.to(tokens.dtype).contiguous()


@_repair.register_fake
def _(tokens: Tensor, mask: Tensor, height: int, width: int, backend: str) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, height, width, _ = inputs
    ctx.grid = height, width
    ctx.save_for_backward(mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A replaced token gives its gradient to the good ones around it, in equal shares."""
    (mask,) = ctx.saved_tensors
    dtype, bad = chunked.compute_dtype(grad), mask.unsqueeze(-1)
    count = _good_around(mask, ctx.grid, dtype)
    shares = (grad / count).masked_fill_(~bad, 0)  # of none around: reaches no good token
    received = _window_sums(shares, ctx.grid).masked_fill_(bad, 0)
    received += grad.masked_fill(bad & (count > 0), 0)
    return received.to(grad.dtype), None, None, None, None


_repair.register_autograd(_backward, setup_context=_save_for_backward)


def repair(
    tokens: Tensor, mask: Tensor, grid: tuple[int, int], *, backend: str | None = None
) -> Tensor:
    """Replace each outlier token by the mean of its 8 neighbours that are no outliers.

    An outlier without such a neighbour keeps its value (SC-CLIP's rule). Differentiable by `tokens`
    in reverse mode. A token that is not finite is replaced like any other if the mask has it, and
    otherwise enters the means of its neighbours: include such tokens in the mask.

    Args:
        tokens: (N, D) or (B, N, D), floating, any strides, row by row: token i is patch
            (i // W, i % W).
        mask: bool, (N,) or (B, N), True for outliers; what `outlier_mask` returns.
        grid: (H, W) in patches, H W = N.
        backend: "triton", "torch", "reference" or None for the default (see `scclip_fast.backend`).
            On a GPU the reference waits for it, to count the outliers.

    Returns:
        A new tensor of the shape and dtype of `tokens`, contiguous; means are float32 at least.

    Raises:
        TypeError: tokens is not floating or mask not bool.
        ValueError: shapes or devices that do not fit, H W other than N, a backend that cannot run.
        NotImplementedError: a tangent of forward-mode differentiation.
    """
    _check.floating("tokens", tokens)
    batch = _check.batched("tokens", tokens, "B, N, D")  # N = 1 is meant, as the grid says so
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True for outliers, got {found}")
    _check.shape("mask", mask, tuple(tokens.shape[:-1]), "(that of tokens without the last dim)")
    _check.same_device(tokens=tokens, mask=mask)
    _check.no_tangent("repair", batch)
    height, width = _check_grid(grid, batch.shape[1])
    outliers = mask.reshape(batch.shape[:2])
    resolved = resolve(backend, tokens)
    (batch,) = operands(resolved, batch)
    return _repair(batch, outliers, height, width, resolved).to(tokens.dtype).view_as(tokens)


def _pooled(tokens: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The same rule by sums over 3 x 3 windows of the good tokens.

    A window's own centre is an outlier wherever the result is used, so it counts for nothing.
    """
    bad = mask.unsqueeze(-1)
    count = _good_around(mask, grid, tokens.dtype)
    mean = _window_sums(tokens.masked_fill(bad, 0), grid) / count
    return torch.where(bad & (count > 0), mean, tokens)


def _good_around(mask: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """How many good tokens there are in the 3 x 3 window of each, (B, N, 1)."""
    return _window_sums((~mask).unsqueeze(-1).to(dtype), grid)


def _window_sums(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sums over the 3 x 3 window of each of (B, N, C)."""
    batch, n, width = tokens.shape
    image = tokens.reshape(batch, *grid, width).permute(0, 3, 1, 2)
    sums = F.avg_pool2d(image, kernel_size=3, stride=1, padding=1, divisor_override=1)
    return sums.reshape(batch, width, n).mT


def _check_grid(grid: tuple[int, int], n: int) -> tuple[int, int]:
    try:
        height, width = grid
    except (TypeError, ValueError):
        raise ValueError(f"grid must be (H, W) in patches, got {grid!r}") from None
    if not all(isinstance(side, (Integral, torch.SymInt)) for side in (height, width)):
        raise ValueError(f"grid must be two integers, (H, W) in patches, got {grid!r}")
    if height < 1 or width < 1 or height * width != n:
        raise ValueError(f"grid must be (H, W) with H * W = N, got {grid!r} for N={n} tokens")
    return height, width
