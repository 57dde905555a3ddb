"""Nearest neighbours, Local Outlier Factor, and the mask of outlier tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import chunked, reference, search
from ..backend import NAMESPACE, resolve
from ..precision import true_float32
from . import _check

MAX_NEIGHBORS = 128  # the kernel keeps that many candidates a row in registers
VARIANTS = ("scclip", "breunig")


@torch.library.custom_op(f"{NAMESPACE}::nearest", mutates_args=())
@true_float32
def _nearest(x: Tensor, k: int, measure_all: bool, backend: str) -> tuple[Tensor, Tensor]:
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
    return search.nearest(x, k, every_distance=measure_all)


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


def knn(
    x: Tensor, k: int, *, check_finite: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest other tokens of every token, by Euclidean distance.

    A token is never its own neighbour, by identity and not by distance. The neighbours of a token
    are those with the smallest measured distance, a sum of squared differences in float32 (float64
    for float64): products find candidates, a bound on what their rounding can have done certifies
    each token's set, and tokens without a certificate are searched again. Only neighbours whose
    distances tie within the rounding of that sum can differ from those of exact arithmetic.

    Args:
        x: (N, D) or (B, N, D), any strides; float16, bfloat16, float32 or float64. Images of a
            batch are independent. Sequence-first tokens (N, B, D) need `x.transpose(0, 1)`.
        k: 1 <= k < N; the Triton kernel takes up to 128, above which the torch path runs.
        check_finite: raise if a token is not finite (this waits for the GPU). Without it such a
            token is the neighbour of another only where nothing else is left, at distance inf.
        backend: "triton", "torch", "reference" or None for the default (see `scclip_fast.backend`).

    Returns:
        Squared distances (N, k) or (B, N, k), float32 (float64 for float64), ascending, and indices
        of the same shape, int64; equal distances by lower index. A square that overflows is inf.
        Neither carries a gradient. The torch path waits for a GPU once, the Triton path never.

    Raises:
        TypeError: x is no floating tensor or k no int.
        ValueError: wrong rank, an empty dimension other than the batch, k outside [1, N - 1], a
            token that is not finite (with check_finite), or a backend that cannot run.
    """
    tokens, k, backend = _prepare(x, "x", k, "k", check_finite, backend)
    distances, indices = _nearest(tokens, k, True, backend)
    distances = distances.masked_fill(distances.isnan(), torch.inf)
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
        features: (N, D) or (B, N, D); see `knn`. A map (h, w, D) passes for h images of w tokens:
            flatten it, as in `features.flatten(1, 2)` for (B, h, w, D) and
            `features[0].flatten(0, 1)` for its first image. Sequence-first tokens (N, B, D) pass
            for N images where B exceeds n_neighbors, and cannot be told from them.
        n_neighbors: k, 1 <= k < N. More than k artefacts that are alike are a cluster of their own,
            in which LOF finds no outlier; `norm_scores` does. The k-distance of more than k equal
            tokens is 0, for which the smallest other one of the image stands: they score 1.
        variant: "scclip" or "breunig".
        check_finite: raise if a token is not finite (this waits for the GPU). Without it such a
            token scores NaN and is nobody's neighbour.
        backend: see `knn`.

    Returns:
        (N,) or (B, N), float32 (float64 for float64), without a gradient. Scores are finite, and
        NaN only for tokens that are not finite or have fewer than k finite others. A token whose
        squared distances overflow has the highest score. The torch path waits for a GPU once, the
        Triton path never.

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

    The quantile is that of `torch.quantile`, linear, with the rank as torch 2.14 computes it: the
    fraction has the dtype of the scores, and its product with N - 1 is exact. A rank that is whole
    on paper can so lie a little below, and the token there is an outlier too, if its distance to
    the next lower score is large enough. Earlier releases round the rank and leave that token out.

    Args:
        scores: (N,) or (B, N), floating; float16 and bfloat16 count as float32. Scores (h, w) of a
            grid pass for h images: flatten them first. NaN scores are left out of the quantile and
            are never outliers.
        contamination: in (0, 0.5].
        backend: checked, and otherwise without effect: a sort needs no kernel of ours.

    Returns:
        bool, of the shape of `scores`.

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
    """Outlier tokens and their LOF scores; SC-CLIP's `lof_pytorch`, batched.

    `scclip_fast.dropin.lof_pytorch` has the published layout and return.

    Counting the outliers waits for the GPU; `outlier_mask(lof_scores(features))` does not.

    Args:
        features: (N, D) or (B, N, D), batch first; flatten maps (h, w, D) as for `lof_scores`.
        n_neighbors, variant, check_finite, backend: see `lof_scores`.
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


def norm_scores(
    features: Tensor, *, check_finite: bool = False, backend: str | None = None
) -> Tensor:
    """The norm of every token over the median norm of its image: 1 is ordinary.

    The norm tells artefacts of vision transformers ("registers", Darcet et al. 2024) however many
    of them are alike, where LOF takes more than n_neighbors of them for a cluster. `outlier_mask`
    marks outliers by these scores as by LOF's.

    Args:
        features: (N, D) or (B, N, D), floating, batch first; flatten maps (h, w, D) as for
            `lof_scores`.
        check_finite: raise if a token is not finite (this waits for the GPU). Without it such a
            token scores NaN and is left out of the median.
        backend: checked, and otherwise without effect: the norms need no kernel of ours.

    Returns:
        (N,) or (B, N), float32 (float64 for float64), finite for finite tokens, without a gradient.
        Where the median is 0, the norms themselves. Beyond the scores, memory for one copy of the
        features is taken. Nothing here waits for the GPU.

    Raises:
        TypeError: features is no floating tensor.
        ValueError: wrong rank, an empty dimension other than the batch, a token that is not finite
            (with check_finite), or a backend that cannot run.
    """
    tokens = _check.tokens("features", features).detach()
    if check_finite:
        _check.all_finite("features", tokens)
    resolve(backend, tokens)
    scores = reference.norm_scores(tokens.to(chunked.compute_dtype(tokens)))
    return scores if features.dim() == 3 else scores[0]


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
