"""Means of tokens weighted by the cosine similarity of their features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import chunked, reference
from ..backend import NAMESPACE, operands, resolve
from ..precision import true_float32
from . import _check


@torch.library.custom_op(f"{NAMESPACE}::aggregate", mutates_args=())
@true_float32
def weighted_mean(
    values: Tensor, features: Tensor, floor: Tensor, gamma: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    """`reference.aggregate`: weighted means (B, N, Dv) and the sums of the weights (B, N)."""
    if backend == "triton" and values.numel():
        from ..kernels.aggregate import aggregate_triton

        return aggregate_triton(values, features, floor, gamma, reference.normaliser_eps(gamma))
    if backend == "reference":
        dtype = chunked.compute_dtype(values, features)
        out, total = reference.aggregate(values.to(dtype), features.to(dtype), floor, gamma)
        return out.to(values.dtype), total
    return chunked.aggregate(values, features, floor, gamma)


@weighted_mean.register_fake
def _(
    values: Tensor, features: Tensor, floor: Tensor, gamma: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = chunked.compute_dtype(values, features)
    return values.new_empty(values.shape), values.new_empty(values.shape[:2], dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::aggregate_backward", mutates_args=())
@true_float32
def _weighted_mean_backward(
    grad: Tensor,
    values: Tensor,
    features: Tensor,
    floor: Tensor,
    gamma: float | None,
    out: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor]:
    return chunked.aggregate_backward(grad, values, features, floor, gamma, out, total)


@_weighted_mean_backward.register_fake
def _(
    grad: Tensor,
    values: Tensor,
    features: Tensor,
    floor: Tensor,
    gamma: float | None,
    out: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), features.new_empty(features.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, features, floor, ctx.gamma, _ = inputs
    ctx.save_for_backward(values, features, floor, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    values, features, floor, out, total = ctx.saved_tensors
    grads = _weighted_mean_backward(grad, values, features, floor, ctx.gamma, out, total)
    return *grads, None, None, None


weighted_mean.register_autograd(_backward, setup_context=_save_for_backward)


def aggregate(
    values: Tensor, features: Tensor, beta: float = 0.4, *, backend: str | None = None
) -> Tensor:
    """SC-CLIP's adaptive aggregation: means of tokens that are alike, without an N x N matrix.

    out_i = sum_j S_ij v_j / (sum_j S_ij + 1e-6) over j with S_ij >= beta, where S is the cosine
    similarity of the features. Differentiable by values and features (once, in reverse mode). The
    backward pass recomputes S and is chunked torch code.

    A token whose features are not finite, or whose norm overflows float32 (float64 for float64 and
    on the reference), has weight 0 for all others whatever its values are, and its own row is NaN.
    No gradient goes to such a token or comes from it. Values of all other tokens must be finite,
    because 0 times NaN is NaN, which may reach rows that have no weight for that token.

    Args:
        values: (N, Dv) or (B, N, Dv), floating.
        features: (N, D) or (B, N, D), floating; its dtype may differ.
        beta: threshold on the cosine similarity.
        backend: "triton", "torch", "reference" or None for the default (see `scclip_fast.backend`).

    Returns:
        A tensor of the shape and dtype of `values`. Sums are float32 at least.

    Raises:
        TypeError: not floating.
        ValueError: shapes or devices that do not fit, a beta that is not finite, a backend that
            cannot run.
        NotImplementedError: a tangent of forward-mode differentiation.
    """
    v, f = value_and_feature_tokens(values, features)
    _check.no_tangent("aggregate", v, f)
    beta = _check.number("beta", beta)
    resolved = resolve(backend, v, f)
    v, f = operands(resolved, v, f)
    floor = torch.full(v.shape[:1], beta, dtype=chunked.compute_dtype(v, f), device=v.device)
    out, _ = weighted_mean(v, f, floor, None, resolved)
    return out.to(values.dtype).view_as(values)


def value_and_feature_tokens(values: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """The checked arguments as batches (B, N, Dv) and (B, N, D)."""
    v, f = _check.tokens("values", values), _check.tokens("features", features)
    _check.same_rank(values=values, features=features)
    _check.same_device(values=values, features=features)
    _check.shape("features", f, (*v.shape[:2], f.shape[-1]), "for the tokens of values")
    return v, f
