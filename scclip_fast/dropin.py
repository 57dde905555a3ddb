"""The functions of published SC-CLIP code, with its names, its layouts and its returns.

A repository that follows SC-CLIP (Bai et al., arXiv 2411.15869) changes one import:

    from scclip_fast.dropin import adaptively_aggregate, lof_pytorch, mean_interpolation

Tokens are sequence first here, (N, D) or (N, B, D), while the ops of `scclip_fast` are batch first.
The functions call these ops and have their backends, precision and memory. A class whose methods
these functions replace takes them as `staticmethod(lof_pytorch)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

import torch
from torch import Tensor

from .ops import _check, lof, repair
from .ops import adaptive_aggregate as aggregate_batch_first


def lof_pytorch(
    x: Tensor, n_neighbors: int = 30, contamination: float = 0.05
) -> tuple[Tensor, Tensor]:
    """Outlier tokens of one image by SC-CLIP's Local Outlier Factor; see `scclip_fast.lof`.

    Args:
        x: (N, D), floating, the patch tokens of one image. For (N, 1, D) pass `x.squeeze(1)`.
        n_neighbors: k, 1 <= k < N.
        contamination: the share of outliers, in (0, 0.5].

    Returns:
        Indices (M,) of the outliers, int64, ascending, and scores (N,), float32 (float64 for
        float64), where the published code returns the dtype of x. Counting the outliers waits for
        the GPU.

    Raises:
        TypeError: x is no floating tensor.
        ValueError: x is not (N, D), or a number is out of range.
    """
    _check.floating("x", x)
    if x.dim() != 2:
        raise ValueError(
            f"x must be (N, D), the tokens of one image, got shape {tuple(x.shape)}; "
            "scclip_fast.lof takes batches (B, N, D)"
        )
    return lof(x, n_neighbors, contamination)


def detect_outlier_patches(
    features: Tensor, n_neighbors: int = 30, contamination: float = 0.05
) -> tuple[Tensor, Tensor]:
    """`lof_pytorch` under its name in ports of SC-CLIP to SAM3."""
    return lof_pytorch(features, n_neighbors, contamination)


def adaptively_aggregate(feats: Tensor, S: Tensor) -> Tensor:
    """Means of tokens by an explicit similarity matrix, S feats / (rowsum(S) + 1e-6).

    `scclip_fast.aggregate` computes the same from the features, without a matrix. Differentiable.

    Args:
        feats: (N, B, D), floating.
        S: (B, N, N), floating, thresholded; as `scclip_fast.similarity` returns it.

    Returns:
        (N, B, D), in the dtype of `feats`.

    Raises:
        TypeError: feats or S is not floating.
        ValueError: shapes or devices that do not fit.
    """
    _check.floating("feats", feats)
    _check.floating("S", S)
    if feats.dim() != 3 or tuple(S.shape) != (feats.shape[1], feats.shape[0], feats.shape[0]):
        raise ValueError(
            "feats must be (N, B, D), sequence first, and S (B, N, N), "
            f"got shapes {tuple(feats.shape)} and {tuple(S.shape)}"
        )
    return aggregate_batch_first(feats.transpose(0, 1), S).transpose(0, 1)


def adaptive_aggregate(features: Tensor, similarity_matrix: Tensor) -> Tensor:
    """`adaptively_aggregate` under its name in ports of SC-CLIP to SAM3."""
    return adaptively_aggregate(features, similarity_matrix)


def mean_interpolation(feature_map: Tensor, top_indices: Iterable[tuple[int, int]]) -> Tensor:
    """Feature maps with the listed patches replaced by the mean of their unlisted 8-neighbours.

    A patch without such a neighbour keeps its value; see `scclip_fast.repair`. Differentiable by
    `feature_map`, which is left as it is.

    Args:
        feature_map: (B, C, H, W), floating.
        top_indices: pairs (row, column), the same for all images, of integers or of tensors of one
            integer. Reading tensors waits for a GPU.

    Returns:
        (B, C, H, W), in the dtype of `feature_map`.

    Raises:
        TypeError: feature_map is no floating tensor, or an index no integer.
        ValueError: feature_map is not (B, C, H, W), or an index lies outside of the map.
    """
    _check.floating("feature_map", feature_map)
    if feature_map.dim() != 4:
        raise ValueError(f"feature_map must be (B, C, H, W), got shape {tuple(feature_map.shape)}")
    batch, _, height, width = feature_map.shape
    mask = torch.zeros(height, width, dtype=torch.bool)
    for pair in top_indices:
        row, column = map(index, pair)
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(
                f"top_indices must be pairs (row, column) within ({height}, {width}), "
                f"got {(row, column)}"
            )
        mask[row, column] = True
    mask = mask.flatten().to(feature_map.device).expand(batch, -1)
    repaired = repair(feature_map.flatten(2).mT, mask, (height, width))
    return repaired.mT.unflatten(2, (height, width))
