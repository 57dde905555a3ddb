"""Nearest neighbours among the tokens of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import chunked, reference
from ..backend import NAMESPACE, resolve
from ..precision import true_float32
from . import _check

MAX_NEIGHBORS = 128  # the kernel keeps that many candidates a row in registers


@torch.library.custom_op(f"{NAMESPACE}::nearest", mutates_args=())
@true_float32
def nearest(x: Tensor, k: int, measure_all: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Squared distances and indices (B, N, k) of the nearest others of x (B, N, D), nearest first.

    Without measure_all, the result holds the distance of the k-th neighbour alone, (B, N, 1), and
    the indices come in any order. A pair with a token that is not finite has the distance NaN.
    """
    if backend == "triton" and x.numel():
        from ..kernels.knn import nearest_triton

        return nearest_triton(x, k, measure_all)
    if backend == "reference":
        distances, indices = reference.knn(x.double(), k)
        distances = distances if measure_all else distances[..., -1:]
        return distances.to(chunked.compute_dtype(x)), indices.contiguous()
    return chunked.nearest(x, k, measure_all=measure_all)


@nearest.register_fake
def _(x: Tensor, k: int, measure_all: bool, backend: str) -> tuple[Tensor, Tensor]:
    dtype = chunked.compute_dtype(x)
    distances = x.new_empty((*x.shape[:2], k if measure_all else 1), dtype=dtype)
    return distances, x.new_empty((*x.shape[:2], k), dtype=torch.int64)


def knn(
    x: Tensor, k: int, *, check_finite: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest other tokens of every token, by Euclidean distance.

    A token is never its own neighbour, by identity and not by distance. The neighbours of a token
    have the smallest measured distances, which are sums of squared differences in float32 (float64
    for float64). Products find candidates, a bound on their rounding certifies the neighbours of
    each token, and tokens without a certificate are searched again. Only neighbours whose distances
    tie within the rounding of that sum can differ from those of exact arithmetic.

    Args:
        x: (N, D) or (B, N, D), any strides; float16, bfloat16, float32 or float64. Images of a
            batch are independent. Sequence-first tokens (N, B, D) need `x.transpose(0, 1)`.
        k: 1 <= k < N. The Triton kernel takes up to 128; above, the torch path runs.
        check_finite: raise if a token is not finite (this waits for the GPU). Without it such a
            token is the neighbour of another only if no finite token is left, at distance inf.
        backend: "triton", "torch", "reference" or None for the default (see `scclip_fast.backend`).

    Returns:
        Squared distances (N, k) or (B, N, k), float32 (float64 for float64), ascending, and indices
        of the same shape, int64. Equal distances come by lower index. A square that overflows is
        inf. Neither carries a gradient. The torch path waits for a GPU once, the Triton path never.

    Raises:
        TypeError: x is no floating tensor or k no int.
        ValueError: wrong rank, an empty dimension other than the batch, k outside [1, N - 1], a
            token that is not finite (with check_finite), or a backend that cannot run.
    """
    tokens, k, backend = check_search(x, "x", k, "k", check_finite, backend)
    distances, indices = nearest(tokens, k, True, backend)
    distances = distances.masked_fill(distances.isnan(), torch.inf)
    return (distances, indices) if x.dim() == 3 else (distances[0], indices[0])


def check_search(
    x: Tensor, name: str, k: int, k_name: str, check_finite: bool, backend: str | None
) -> tuple[Tensor, int, str]:
    """The checked arguments of a search: tokens (B, N, D), k, and the backend that runs it.

    The torch path takes the place of Triton if k exceeds `MAX_NEIGHBORS`. If the argument `backend`
    itself asks for Triton, this k raises ValueError.
    """
    tokens = _check.tokens(name, x).detach()
    k = _check.neighbor_count(k_name, k, tokens.shape[1])
    if check_finite:
        _check.all_finite(name, tokens)
    resolved = resolve(backend, tokens)
    if resolved == "triton" and k > MAX_NEIGHBORS:
        if backend == "triton":
            raise ValueError(
                f'{k_name} must be at most {MAX_NEIGHBORS} on backend "triton", got {k}'
            )
        resolved = "torch"
    return tokens, k, resolved
