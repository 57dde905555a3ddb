"""Repair of outlier tokens by their neighbours in the image."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .. import chunked, reference
from ..backend import NAMESPACE, operands, resolve
from . import _check


@torch.library.custom_op(f"{NAMESPACE}::repair", mutates_args=())
def _repair(tokens: Tensor, mask: Tensor, height: int, width: int, backend: str) -> Tensor:
    """`reference.repair` of tokens (B, N, D) and mask (B, N), as a contiguous tensor."""
    if backend == "triton":
        from ..kernels.repair import repair_triton

        return repair_triton(tokens, mask, (height, width))
    rule = reference.repair if backend == "reference" else chunked.repair
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
    (mask,) = ctx.saved_tensors
    return chunked.repair_backward(grad, mask, ctx.grid), None, None, None, None


_repair.register_autograd(_backward, setup_context=_save_for_backward)


def repair(
    tokens: Tensor, mask: Tensor, grid: tuple[int, int], *, backend: str | None = None
) -> Tensor:
    """Replaces each outlier token by the mean of its 8 neighbours that are no outliers.

    An outlier without such a neighbour keeps its value (SC-CLIP's rule). Differentiable by `tokens`
    in reverse mode. A token that is not finite is replaced like any other if the mask marks it.
    Otherwise it enters the means of its neighbours, so include such tokens in the mask.

    Args:
        tokens: (N, D) or (B, N, D), floating, any strides, row by row: token i is patch
            (i // W, i % W).
        mask: bool, (N,) or (B, N), True for outliers, as `outlier_mask` returns it.
        grid: (H, W) in patches, H W = N.
        backend: "triton", "torch", "reference" or None for the default (see `scclip_fast.backend`).
            The reference waits for a GPU, to count the outliers.

    Returns:
        A new tensor of the shape and dtype of `tokens`, contiguous; means are float32 at least.

    Raises:
        TypeError: tokens is not floating or mask not bool.
        ValueError: shapes or devices that do not fit, H W other than N, a backend that cannot run.
        NotImplementedError: a tangent of forward-mode differentiation.
    """
    _check.floating("tokens", tokens)
    batch = _check.batched("tokens", tokens, "B, N, D")  # N = 1 is allowed, as the grid confirms it
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True for outliers, got {given}")
    _check.shape("mask", mask, tuple(tokens.shape[:-1]), "(that of tokens without the last dim)")
    _check.same_device(tokens=tokens, mask=mask)
    _check.no_tangent("repair", batch)
    height, width = _check_grid(grid, batch.shape[1])
    outliers = mask.reshape(batch.shape[:2])
    resolved = resolve(backend, tokens)
    (batch,) = operands(resolved, batch)
    return _repair(batch, outliers, height, width, resolved).to(tokens.dtype).view_as(tokens)


def _check_grid(grid: tuple[int, int], n: int) -> tuple[int, int]:
    """The grid (H, W) of n tokens, or ValueError."""
    try:
        height, width = grid
    except (TypeError, ValueError):
        raise ValueError(f"grid must be (H, W) in patches, got {grid!r}") from None
    if not all(isinstance(side, (Integral, torch.SymInt)) for side in (height, width)):
        raise ValueError(f"grid must be two integers, (H, W) in patches, got {grid!r}")
    if height < 1 or width < 1 or height * width != n:
        raise ValueError(f"grid must be (H, W) with H * W = N, got {grid!r} for N={n} tokens")
    return height, width
