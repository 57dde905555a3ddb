"""Nearest neighbours, Local Outlier Factor, and the mask of outlier tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import chunked, reference, search
from ..backend import NAMESPACE, resolve
from ..precision import true_float32
from . import _check

MAX_NEIGHBORS = 128  # the kernel keeps that many candidates a row in registers
BAND = 4  # candidates on either side of the k-th place whose order is measured, not estimated
VARIANTS = ("scclip", "breunig")


@torch.library.custom_op(f"{NAMESPACE}::nearest", mutates_args=())
@true_float32
def _nearest(x: Tensor, k: int, measure_all: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Squared distances and indices (B, N, k) of the nearest others of x (B, N, D), nearest first.

    Without measure_all: the distance of the k-th alone (B, N, 1), and indices whose last is its.
    """
    if backend == "triton" and x.numel():
        from ..kernels.nearest import nearest_triton

        return nearest_triton(x, k, measure_all)
    if backend == "reference":
        distances, indices = reference.knn(x.to(chunked.compute_dtype(x)), k)
    else:
        candidates = search.neighbors(x, min(k + BAND, x.shape[1] - 1))
        measure = partial(search.pair_distances, x)
        distances, indices = settle_last(candidates, k, k if measure_all else BAND, measure)
    distances = distances if measure_all else distances[..., -1:]
    return distances.contiguous(), indices.contiguous()


@_nearest.register_fake
def _(x: Tensor, k: int, measure_all: bool, backend: str) -> tuple[Tensor, Tensor]:
    dtype = chunked.compute_dtype(x)
    distances = x.new_empty((*x.shape[:2], k if measure_all else 1), dtype=dtype)
    return distances, x.new_empty((*x.shape[:2], k), dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::simplified_lof", mutates_args=())
@true_float32
def _simplified_lof(k_distance: Tensor, neighbors: Tensor, backend: str) -> Tensor:
    """`reference.simplified_lof`: scores (B, N)."""
    if backend == "triton" and k_distance.numel():
        from ..kernels.lof import simplified_lof_triton

        return simplified_lof_triton(k_distance, neighbors)
    return reference.simplified_lof(k_distance, neighbors)


@_simplified_lof.register_fake
def _(k_distance: Tensor, neighbors: Tensor, backend: str) -> Tensor:
    return torch.empty_like(k_distance, memory_format=torch.contiguous_format)


def settle_last(
    candidates: Tensor, k: int, measured: int, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Indices (B, M, k) of the nearest and the squared distances of the last `measured`.

    The search ranks by products whose rounding is that of the norms. A few candidates more than k,
    measured as sums of squared differences, settle who is among the k.
    """
    settled, undecided = candidates.tensor_split([max(0, k - measured)], dim=-1)
    distances, chosen = settle(undecided, k - settled.shape[-1], measure)
    return distances, torch.cat([settled, chosen], dim=-1)


def settle(
    candidates: Tensor, places: int, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Squared distances and indices (B, M, places), nearest first, of the candidates (B, M, m).

    measure takes candidates to squared distances; of equal ones, the lower index.
    """
    candidates = candidates.sort(dim=-1).values
    distances, order = measure(candidates).sort(dim=-1, stable=True)
    return distances[..., :places], candidates.gather(-1, order[..., :places])


def knn(
    x: Tensor, k: int, *, check_finite: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest other tokens of every token, by Euclidean distance.

    A token is never its own neighbour, by identity and not by distance. Neighbours are chosen among
    all pairs in float32 (float64 for float64); their distances are then measured as sums of squared
    differences.

    Args:
        x: (N, D) or (B, N, D), any strides; float16, bfloat16, float32 or float64. Images of a
            batch are independent.
        k: 1 <= k < N; the Triton kernel takes up to 128, above which the torch path runs.
        check_finite: raise if a token is not finite (this waits for the GPU). Without it such a
            token is the neighbour of another only where nothing else is left, at distance inf.
        backend: "triton", "torch", "reference" or None for the default (see `scclip_fast.backend`).

    Returns:
        Squared distances (N, k) or (B, N, k), float32 (float64 for float64), ascending, and indices
        of the same shape, int64; equal distances by lower index. Neither carries a gradient.

    Raises:
        TypeError: x is no floating tensor or k no int.
        ValueError: wrong rank, an empty dimension other than the batch, k outside [1, N - 1], a
            token that is not finite (with check_finite), or a backend that cannot run.
    """
    tokens, k, backend = _prepare(x, "x", k, "k", check_finite, backend)
    distances, indices = _nearest(tokens, k, True, backend)
    return (distances, indices) if x.dim() == 3 else (distances[0], indices[0])


def lof_scores(
    features: Tensor,
    n_neighbors: int = 30,
    *,
    variant: str = "scclip",
    check_finite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Local Outlier Factor of every token: about 1 inside a cluster, larger outside.

    `variant="scclip"` is what SC-CLIP runs: on squared distances, with kappa_i the k-th smallest
    and the point's own k-distance for reachability, LOF_i = kappa_i mean_j 1 / kappa_j (the
    simplified LOF of Schubert et al. 2014). `variant="breunig"` is the textbook form (Breunig et
    al. 2000) on plain distances, equal to the negative of scikit-learn's
    `negative_outlier_factor_`.

    Args:
        features: (N, D) or (B, N, D); see `knn`.
        n_neighbors: k, 1 <= k < N.
        variant: "scclip" or "breunig".
        check_finite: raise if a token is not finite (this waits for the GPU). Without it such a
            token scores NaN and is nobody's neighbour.
        backend: see `knn`.

    Returns:
        (N,) or (B, N), float32 (float64 for float64), without a gradient. Duplicates score 1, never
        NaN. Nothing here waits for the GPU.

    Raises:
        TypeError, ValueError: as `knn`, and for an unknown variant.
    """
    check_variant(variant)
    tokens, k, backend = _prepare(
        features, "features", n_neighbors, "n_neighbors", check_finite, backend
    )
    if variant == "scclip":
        distances, neighbors = _nearest(tokens, k, False, backend)
        scores = _simplified_lof(distances[..., -1], neighbors, backend)
    else:
        distances, neighbors = _nearest(tokens, k, True, backend)
        scores = reference.breunig_lof(distances.sqrt(), neighbors)
    return scores if features.dim() == 3 else scores[0]


def check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")


def outlier_mask(
    scores: Tensor, contamination: float = 0.05, *, backend: str | None = None
) -> Tensor:
    """scores > quantile(scores, 1 - contamination), per image.

    Args:
        scores: (N,) or (B, N), floating. NaN scores are left out of the quantile and are never
            outliers.
        contamination: in (0, 0.5].
        backend: checked, and otherwise without effect: a sort needs no kernel of ours.

    Returns:
        bool, of the shape of `scores`. The quantile interpolates linearly, as `torch.quantile`
        does.

    Raises:
        TypeError, ValueError: `scores` is no floating tensor of that rank, or contamination is out
            of range.
    """
    _check.floating("scores", scores)
    batch = _check.batched("scores", scores, "B, N")
    share = _check.contamination(contamination)
    resolve(backend, scores)
    mask = reference.outlier_mask(batch.to(chunked.compute_dtype(batch)), share)
    return mask if scores.dim() == 2 else mask[0]


def lof(
    features: Tensor,
    n_neighbors: int = 30,
    contamination: float = 0.05,
    *,
    variant: str = "scclip",
    check_finite: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Outlier tokens and their LOF scores; a drop-in for SC-CLIP's `lof_pytorch`.

    Counting the outliers waits for the GPU; `outlier_mask(lof_scores(features))` does not.

    Args:
        features, n_neighbors, variant, check_finite, backend: see `lof_scores`.
        contamination: the share of outliers, in (0, 0.5].

    Returns:
        (indices, scores). For (N, D): indices (M,) int64 ascending, scores (N,). For (B, N, D):
        indices (M, 2), rows of (image, token), scores (B, N).

    Raises:
        TypeError, ValueError: as `lof_scores` and `outlier_mask`.
    """
    _check.contamination(contamination)
    scores = lof_scores(
        features, n_neighbors, variant=variant, check_finite=check_finite, backend=backend
    )
    indices = outlier_mask(scores, contamination).nonzero()
    return (indices if features.dim() == 3 else indices[:, 0]), scores


def _prepare(
    x: Tensor, name: str, k: int, k_name: str, check_finite: bool, backend: str | None
) -> tuple[Tensor, int, str]:
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
