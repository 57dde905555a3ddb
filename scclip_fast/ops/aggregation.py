"""Cosine similarity of tokens and the aggregation of values by it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import chunked, reference
from ..backend import NAMESPACE, operands, resolve
from ..precision import true_float32
from . import _check
from .product import product


@torch.library.custom_op(f"{NAMESPACE}::aggregate", mutates_args=())
@true_float32
def weighted_mean(
    values: Tensor, features: Tensor, floor: Tensor, gamma: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    """`reference.aggregate`: weighted means (B, N, Dv) and the sums of the weights (B, N)."""
    if backend == "triton" and values.numel():
        from ..kernels.aggregate import aggregate_triton

        scale = chunked.inverse_norms(features).squeeze(-1)
        return aggregate_triton(
            values, features, scale, floor, gamma, reference.normaliser_eps(gamma)
        )
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


def similarity(
    features: Tensor, beta: float = 0.4, normalize: bool = True, *, backend: str | None = None
) -> Tensor:
    """The explicit matrix S 1[S >= beta], S = f_hat f_hat^T, for small N and for teaching.

    `aggregate` gives what one usually wants it for, without the matrix. Differentiable. Rows and
    columns of tokens that are not finite are NaN.

    Args:
        features: (N, D) or (B, N, D), floating.
        beta: threshold, finite or -inf, which keeps every entry; -1 keeps every cosine but for
            rounding, and without `normalize` products lie anywhere.
        normalize: divide the features by their norms first; without it S = f f^T.
        backend: "reference", in float64, or "torch" and "triton", which both run torch's matrix
            product.

    Returns:
        (N, N) or (B, N, N), in the dtype of `features`.

    Raises:
        TypeError, ValueError: not floating, wrong rank, or a beta that is NaN or inf.
    """
    batch = _check.tokens("features", features)
    beta = beta if beta == -math.inf else _check.number("beta", beta)
    if resolve(backend, features) == "reference":
        s = reference.similarity(batch.double(), beta, normalize)
    else:
        f = batch.to(chunked.compute_dtype(batch))
        f = reference.unit_vectors(f) if normalize else f
        s = reference.threshold(product(f, f.mT), beta)
    s = s.to(features.dtype)
    return s if features.dim() == 3 else s[0]


def adaptive_aggregate(
    features: Tensor, similarity_matrix: Tensor, *, backend: str | None = None
) -> Tensor:
    """Aggregate by an explicit similarity matrix: S features / (rowsum(S) + 1e-6). Differentiable.

    SC-CLIP's function of this name takes features as (N, B, D); here, as everywhere, the batch
    comes first.

    Args:
        features: (N, D) or (B, N, D), floating.
        similarity_matrix: (N, N) or (B, N, N), floating, such as `similarity` returns.
        backend: as `similarity`.

    Returns:
        Of the shape and dtype of `features`.

    Raises:
        TypeError, ValueError: not floating, or shapes or devices that do not fit.
    """
    batch = _check.tokens("features", features)
    matrix = _check.tokens("similarity_matrix", similarity_matrix)
    _check.same_rank(features=features, similarity_matrix=similarity_matrix)
    _check.same_device(features=features, similarity_matrix=similarity_matrix)
    n = batch.shape[1]
    _check.shape(
        "similarity_matrix", matrix, (batch.shape[0], n, n), "(B, N, N) for features (B, N, D)"
    )
    if resolve(backend, features, similarity_matrix) == "reference":
        out = reference.adaptive_aggregate(batch.double(), matrix.double())
    else:
        dtype = chunked.compute_dtype(batch, matrix)
        # Dividing D columns afterwards is cheaper than N of the matrix before.
        row_sum = matrix.sum(dim=-1, keepdim=True, dtype=dtype)
        out = product(matrix.to(dtype), batch.to(dtype)) / (row_sum + reference.AGGREGATE_EPS)
    return out.to(features.dtype).view_as(features)


def aggregate(
    values: Tensor, features: Tensor, beta: float = 0.4, *, backend: str | None = None
) -> Tensor:
    """SC-CLIP's adaptive aggregation, N x N matrix never made: means of tokens that are alike.

    out_i = sum_j S_ij v_j / (sum_j S_ij + 1e-6) over j with S_ij >= beta, S the cosine similarity
    of the features. Differentiable by values and features (once, in reverse mode); the backward
    pass recomputes S and is chunked torch code.

    A token whose features are not finite, or whose norm overflows float32 (float64 for float64 and
    on the reference), has weight 0 for all others whatever its values, and its own row is NaN; no
    gradient goes to or comes from it. Values of all other tokens must be finite: 0 times NaN is
    NaN, which may reach rows that have no weight for that token.

    Args:
        values: (N, Dv) or (B, N, Dv), floating.
        features: (N, D) or (B, N, D), floating; its dtype may differ.
        beta: threshold on the cosine similarity.
        backend: "triton", "torch", "reference" or None for the default (see `scclip_fast.backend`).

    Returns:
        Of the shape and dtype of `values`; sums are float32 at least.

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
    v, f = _check.tokens("values", values), _check.tokens("features", features)
    _check.same_rank(values=values, features=features)
    _check.same_device(values=values, features=features)
    _check.shape("features", f, (*v.shape[:2], f.shape[-1]), "for the tokens of values")
    return v, f
