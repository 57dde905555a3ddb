"""The Local Outlier Factor, the norm rule, and the mask of outlier tokens."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .. import chunked, reference
from ..backend import NAMESPACE, resolve
from . import _check
from .knn import check_search, search

VARIANTS = ("scclip", "breunig")


@torch.library.custom_op(f"{NAMESPACE}::lof_scores", mutates_args=())
def _lof_scores(x: Tensor, k: int, variant: str, backend: str) -> Tensor:
    """The scores (B, N) of tokens (B, N, D)."""
    distances, neighbors = search(x, k, backend, measure_all=variant == "breunig")
    if variant == "breunig":
        return reference.breunig_lof(distances.sqrt(), neighbors)
    if backend == "triton" and x.numel():
        from ..kernels.lof import simplified_lof_triton

        return simplified_lof_triton(distances[..., -1], neighbors)
    return reference.simplified_lof(distances[..., -1], neighbors)


@_lof_scores.register_fake
def _(x: Tensor, k: int, variant: str, backend: str) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=chunked.compute_dtype(x))


def lof_scores(
    features: Tensor,
    n_neighbors: int = 30,
    *,
    variant: str = "scclip",
    check_finite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Local Outlier Factor of every token: about 1 inside a cluster, larger outside.

    `variant="scclip"` is the form that SC-CLIP runs, the simplified LOF of Schubert et al. 2014 on
    squared distances: LOF_i = kappa_i mean_j 1 / kappa_j over the k neighbours j, with kappa the
    k-th smallest squared distance. The reachability of a point is its own k-distance.
    `variant="breunig"` is the textbook form (Breunig et al. 2000) on plain distances, equal to the
    negative of scikit-learn's `negative_outlier_factor_`.

    Args:
        features: (N, D) or (B, N, D); see `knn`. A map (h, w, D) passes for h images of w tokens:
            flatten it, as in `features.flatten(1, 2)` for (B, h, w, D) and
            `features[0].flatten(0, 1)` for its first image. Sequence-first tokens (N, B, D) pass
            for N images where B exceeds n_neighbors, and cannot be told from them.
        n_neighbors: k, 1 <= k < N. More than k artefacts that are alike are a cluster of their own,
            in which LOF finds no outlier; `norm_scores` does. More than k equal tokens have the
            k-distance 0, which is replaced by the smallest other k-distance of the image, so that
            they score 1.
        variant: "scclip" or "breunig".
        check_finite: raise if a token is not finite (this waits for the GPU). Without it such a
            token scores NaN and is no other token's neighbour.
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
    tokens, k, backend = check_search(
        features, "features", n_neighbors, "n_neighbors", check_finite, backend
    )
    scores = _lof_scores(tokens, k, variant, backend)
    return scores if features.dim() == 3 else scores[0]


def check_variant(variant: str) -> None:
    """Raises ValueError unless the variant is one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")


@torch.library.custom_op(f"{NAMESPACE}::outlier_mask", mutates_args=())
def _outlier_mask(scores: Tensor, contamination: float, backend: str) -> Tensor:
    """`reference.outlier_mask` of scores (B, N): bool (B, N)."""
    if backend == "triton" and scores.numel():
        from ..kernels.outlier_mask import outlier_mask_triton

        return outlier_mask_triton(scores, contamination)
    return reference.outlier_mask(scores, contamination).contiguous()


@_outlier_mask.register_fake
def _(scores: Tensor, contamination: float, backend: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


def outlier_mask(
    scores: Tensor, contamination: float = 0.05, *, backend: str | None = None
) -> Tensor:
    """The mask scores > quantile(scores, 1 - contamination) of outlier tokens, image by image.

    The quantile is that of `torch.quantile`, linear, with the rank as torch 2.14 computes it: the
    fraction has the dtype of the scores, and its product with N - 1 is exact. A rank that is whole
    on paper can therefore lie a little below. The token at this rank is then an outlier too, if its
    score is far enough from the next lower one. Earlier releases of torch round the rank and leave
    that token out.

    Args:
        scores: (N,) or (B, N), floating; float16 and bfloat16 count as float32. Scores (h, w) of a
            grid pass for h images: flatten them first. NaN scores are left out of the quantile and
            are never outliers.
        contamination: in (0, 0.5].
        backend: see `knn`. All backends return the same mask.

    Returns:
        bool, of the shape of `scores`. The GPU is not waited for.

    Raises:
        TypeError, ValueError: `scores` is no floating tensor of that rank, contamination is out of
            range, or backend is one that cannot run.
    """
    _check.floating("scores", scores)
    batch = _check.batched("scores", scores, "B, N")
    share = _check.contamination(contamination)
    resolved = resolve(backend, batch)
    mask = _outlier_mask(batch.detach().to(chunked.compute_dtype(batch)), share, resolved)
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
    """Indices of the outlier tokens, and the LOF scores of all: SC-CLIP's `lof_pytorch`, batched.

    `scclip_fast.dropin.lof_pytorch` has the published layout and return. Counting the outliers
    waits for the GPU; `outlier_mask(lof_scores(features))` does not.

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
    """The norm of every token divided by the median norm of its image; about 1 for most tokens.

    Artefacts of vision transformers ("registers", Darcet et al. 2024) have large norms, however
    many of them are alike. LOF takes more than n_neighbors of them for a cluster. `outlier_mask`
    marks outliers by these scores as by LOF's.

    Args:
        features: (N, D) or (B, N, D), floating, batch first; flatten maps (h, w, D) as for
            `lof_scores`.
        check_finite: raise if a token is not finite (this waits for the GPU). Without it such a
            token scores NaN and is left out of the median.
        backend: deprecated. It is checked and has no effect, and the next release removes it.

    Returns:
        (N,) or (B, N), float32 (float64 for float64), finite for finite tokens, without a gradient.
        If the median is 0, the norms themselves. The peak of memory beyond the scores is one copy
        of the features. The GPU is not waited for.

    Raises:
        TypeError: features is no floating tensor.
        ValueError: wrong rank, an empty dimension other than the batch, a token that is not finite
            (with check_finite), or a backend that cannot run.
    """
    tokens = _check.tokens("features", features).detach()
    if check_finite:
        _check.all_finite("features", tokens)
    if backend is not None:
        message = (
            "backend has no effect on norm_scores: leave it out, as the next release removes it"
        )
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        resolve(backend, tokens)
    scores = reference.norm_scores(tokens.to(chunked.compute_dtype(tokens)))
    return scores if features.dim() == 3 else scores[0]
