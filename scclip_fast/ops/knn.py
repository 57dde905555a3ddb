"""Nearest neighbours among the tokens of an image."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import chunked, reference
from ..backend import NAMESPACE, resolve
from ..chunked.candidates import band
from ..precision import true_float32
from . import _check

MAX_NEIGHBORS = 128  # the kernel keeps that many candidates a row in registers
METRICS = tuple(reference.DISTANCES)


@true_float32
def search(
    x: Tensor,
    k: int,
    backend: str,
    queries: Tensor | None = None,
    metric: str = "euclidean",
    *,
    measure_all: bool = True,
) -> tuple[Tensor, Tensor]:
    """Values and indices (B, M, k) of the tokens of x (B, N, D) nearest to queries (B, M, D).

    Without queries, the nearest others of every token of x. A pair with a token that is not finite
    has the value NaN.

    Args:
        measure_all: False, which only "euclidean" without queries allows, to return the value of
            the k-th neighbour alone, (B, M, 1), and indices in any order.
    """
    if backend == "triton" and x.numel():
        return _search_on_triton(x, k, measure_all, queries, metric)
    if backend == "reference":
        exact = None if queries is None else queries.double()
        values, indices = reference.knn(x.double(), k, exact, metric)
        values = values if measure_all else values[..., -1:]
        return values.to(chunked.compute_dtype(x)), indices.contiguous()
    values, indices = chunked.nearest(x, k, queries, metric, measure_all)
    return values.contiguous(), indices.contiguous()  # the strides that the fake implementation has


@torch.library.custom_op(f"{NAMESPACE}::nearest", mutates_args=())
def nearest(
    x: Tensor, k: int, backend: str, queries: Tensor | None, metric: str
) -> tuple[Tensor, Tensor]:
    """`search` of all values, opaque to torch.compile."""
    return search(x, k, backend, queries, metric)


@nearest.register_fake
def _(
    x: Tensor, k: int, backend: str, queries: Tensor | None, metric: str
) -> tuple[Tensor, Tensor]:
    shape = (*(x if queries is None else queries).shape[:2], k)
    values = x.new_empty(shape, dtype=chunked.compute_dtype(x))
    return values, x.new_empty(shape, dtype=torch.int64)


def knn(
    x: Tensor,
    k: int,
    queries: Tensor | None = None,
    metric: str = "euclidean",
    *,
    check_finite: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest other tokens of every token, or the k tokens nearest to each query.

    Without queries a token is never its own neighbour, by identity and not by distance. A query
    may be equal to a token of x, which is then at the distance 0.

    The neighbours of a token have the smallest measured distances, which are sums of squared
    differences in float32 (float64 for float64). Matrix products find candidates, a bound on their
    rounding certifies the neighbours of each token, and tokens without a certificate are searched
    again. Only neighbours whose distances tie within the rounding of that sum can differ from those
    of exact arithmetic. By "cosine" and "inner_product" the measured values are sums in float64, of
    the differences of unit vectors and of products. Triton searches unit vectors in float32 and
    measures a few more than k of them in float64.

    Args:
        x: (N, D) or (B, N, D), any strides; float16, bfloat16, float32 or float64. Images of a
            batch are independent. Sequence-first tokens (N, B, D) need `x.transpose(0, 1)`.
        k: 1 <= k < N, or 1 <= k <= N with queries.
        queries: (M, D) or (B, M, D), as x has a batch or none, on the same device; float64 if and
            only if x is. M may be 0.
        metric: "euclidean"; "cosine", by which a token of zeros is at the distance 1 from every
            token; or "inner_product", by which the tokens of the largest products are the nearest.
        check_finite: raise if a token is not finite (this waits for the GPU). Without it such a
            token is the neighbour of another only if no finite token is left, at distance inf.
        backend: "triton", "torch", "reference" or None for the default (see `scclip_fast.backend`).
            Triton takes k up to 128 and not "inner_product". The default is the torch path where
            Triton does not take the arguments, on a GPU too.

    Returns:
        Values and indices, (M, k) or (B, M, k), without queries M = N. The values are float32
        (float64 for float64): squared distances or 1 - cos, ascending, or inner products,
        descending. Equal values come by lower index. A square that overflows is inf; the product
        with a token that is not finite is -inf. The indices are int64. Neither carries a gradient.
        The torch path waits for a GPU once or a few times, the Triton path never.

    Raises:
        TypeError: x or queries is no floating tensor, one of them alone is float64, or k is no int.
        ValueError: wrong rank, an empty dimension other than the batch and M, queries unlike x, an
            unknown metric, k out of its range, a token that is not finite (with check_finite), or a
            backend that cannot run.
    """
    _check.choice("metric", metric, METRICS)
    if queries is not None:
        queries = _check_queries(x, queries, check_finite)
    tokens, k, backend = check_search(x, "x", k, "k", check_finite, backend, queries, metric)
    values, indices = nearest(tokens, k, backend, queries, metric)
    worst = -torch.inf if metric == "inner_product" else torch.inf
    values = values.masked_fill(values.isnan(), worst)
    return (values, indices) if x.dim() == 3 else (values[0], indices[0])


def check_search(
    x: Tensor,
    name: str,
    k: int,
    k_name: str,
    check_finite: bool,
    backend: str | None,
    queries: Tensor | None = None,
    metric: str = "euclidean",
) -> tuple[Tensor, int, str]:
    """The checked arguments of a search: tokens (B, N, D), k, and the backend that runs it.

    The torch path takes the place of Triton if Triton does not take the arguments. If the argument
    `backend` itself asks for Triton, such arguments raise ValueError.
    """
    tokens = _check.tokens(name, x).detach()
    n = tokens.shape[1]
    if queries is None:
        k = _check.neighbor_count(k_name, k, n)
    else:
        k = _check.integer(k_name, k, 1, n, " with queries, as x has so many tokens")
    if check_finite:
        _check.all_finite(name, tokens)
    resolved = resolve(backend, tokens)
    if resolved == "triton" and (obstacle := _triton_obstacle(k_name, k, metric)):
        if backend == "triton":
            raise ValueError(f'{obstacle}; use backend "torch" or leave backend=None')
        resolved = "torch"
    return tokens, k, resolved


def _triton_obstacle(k_name: str, k: int, metric: str) -> str | None:
    """The reason why the kernels do not take these arguments, or None if they do."""
    if k > MAX_NEIGHBORS:
        return f'{k_name} must be at most {MAX_NEIGHBORS} on backend "triton", got {k}'
    if metric == "inner_product":
        return 'metric must be "euclidean" or "cosine" on backend "triton", got "inner_product"'
    return None


def _check_queries(x: Tensor, queries: Tensor, check_finite: bool) -> Tensor:
    """Returns the queries as (B, M, D), if they are like x but for the number of tokens.

    Raises:
        TypeError, ValueError: as `knn`.
    """
    _check.floating("x", x)
    _check.floating("queries", queries)
    _check.same_device(x=x, queries=queries)
    if (x.dtype == torch.float64) is not (queries.dtype == torch.float64):
        raise TypeError(
            f"queries must be float64 if and only if x is, got x {x.dtype} and queries "
            f"{queries.dtype}"
        )
    if x.dim() not in (2, 3):
        _check.tokens("x", x)
    if queries.dim() != x.dim() or (*queries.shape[:-2], queries.shape[-1]) != (
        *x.shape[:-2],
        x.shape[-1],
    ):
        expected = (*map(str, x.shape[:-2]), "M", str(x.shape[-1]))
        raise ValueError(
            f"queries must be ({', '.join(expected)}), as x is {tuple(x.shape)}, got shape "
            f"{tuple(queries.shape)}"
        )
    batch = queries.detach() if x.dim() == 3 else queries.detach().unsqueeze(0)
    if check_finite:
        _check.all_finite("queries", batch)
    return batch


def _search_on_triton(
    x: Tensor, k: int, measure_all: bool, queries: Tensor | None, metric: str
) -> tuple[Tensor, Tensor]:
    """`search` by the kernels, by "euclidean" or "cosine".

    The kernels search unit tokens rounded to float32, which may change the order of near ties. So a
    few candidates more than k are measured in float64, as far as the kernels find more than k.
    """
    from ..kernels.knn import nearest_triton

    if metric == "cosine":
        others = x.shape[1] - (queries is None)
        n_candidates = min(k + band(k), others, MAX_NEIGHBORS)
        unit = partial(chunked.unit_tokens, dtype=torch.float32)
        asked = None if queries is None else unit(queries)
        _, candidates = nearest_triton(unit(x), n_candidates, False, asked)
        return chunked.settle_by_cosine(x, candidates, k, queries)
    if queries is not None and queries.dtype != x.dtype:
        x, queries = x.float(), queries.float()
    return nearest_triton(x, k, measure_all, queries)
