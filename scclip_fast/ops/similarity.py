"""The explicit similarity matrix, and the aggregation by such a matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import chunked, reference
from ..backend import NAMESPACE, resolve
from ..precision import true_float32
from . import _check


def similarity(
    features: Tensor, beta: float = 0.4, normalize: bool = True, *, backend: str | None = None
) -> Tensor:
    """The explicit matrix S 1[S >= beta], S = f_hat f_hat^T, for small N and for teaching.

    `aggregate` is the usual purpose of this matrix and needs no matrix. Differentiable. Rows and
    columns of tokens that are not finite are NaN.

    Args:
        features: (N, D) or (B, N, D), floating.
        beta: threshold, finite or -inf. -inf keeps every entry, -1 every cosine up to rounding.
            Without `normalize`, products have no bounds.
        normalize: divides the features by their norms first. If False, S = f f^T.
        backend: "reference" computes in float64, "torch" and "triton" by torch's matrix product.

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
    """Aggregates by an explicit similarity matrix: S features / (rowsum(S) + 1e-6).

    Differentiable. SC-CLIP's function of this name takes features (N, B, D). Here, as everywhere,
    the batch comes first.

    Args:
        features: (N, D) or (B, N, D), floating.
        similarity_matrix: (N, N) or (B, N, N), floating, such as `similarity` returns.
        backend: as for `similarity`.

    Returns:
        A tensor of the shape and dtype of `features`.

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
        # Dividing the D columns of the product is cheaper than the N of the matrix.
        row_sum = matrix.sum(dim=-1, keepdim=True, dtype=dtype)
        out = product(matrix.to(dtype), batch.to(dtype)) / (row_sum + reference.AGGREGATE_EPS)
    return out.to(features.dtype).view_as(features)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (B, N, K) @ b (B, K, M) of one dtype, with float32 multiplied in true float32.

    In a graph of `torch.compile`, the product is one opaque op, which has reverse-mode derivatives
    of any order. Outside a graph, it has forward mode and torch.func too, as torch's own product.
    """
    if not torch.compiler.is_compiling():
        return _Product.apply(a, b)
    _check.no_tangent("a product in a graph", a, b)
    return _product_op(a, b)


@true_float32
def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _save_operands(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_multiply)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _save_operands(ctx, inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return _Product.apply(grad, b.mT), _Product.apply(a.mT, grad)

    @staticmethod
    def jvp(ctx: Any, tangent_a: Tensor, tangent_b: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return _Product.apply(tangent_a, b) + _Product.apply(a, tangent_b)


_product_op = torch.library.custom_op(
    f"{NAMESPACE}::product", _multiply, mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor"
)


@_product_op.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return _product_op(grad, b.mT), _product_op(a.mT, grad)


_product_op.register_autograd(_backward, setup_context=_save_operands)
