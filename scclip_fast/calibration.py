"""The outliers among tokens, where a model's calibration looks for them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .ops import lof_scores, norm_scores, outlier_mask

SCORES = ("lof", "norm", "either")


class Outliers(NamedTuple):
    """Scores (B, N), LOF's or with "norm" `norm_scores`, and the mask (B, N) of the outliers."""

    scores: Tensor
    mask: Tensor


def find_outliers(
    tokens: Tensor, n_neighbors: int, contamination: float, score: str = "lof"
) -> Outliers | None:
    """Outliers of each image in tokens (B, N, D), or None for images of no more than n_neighbors.

    In so few tokens, where all others are neighbours, LOF carries no information and the two that
    are farthest apart tie for the outlier. Scores are float32 at least.

    Args:
        score: one of `SCORES`: "lof", "norm" for `norm_scores`, or "either" for the outliers of
            both, each by the share `contamination`.
    """
    if tokens.shape[1] <= n_neighbors:
        return None
    scores = norm_scores(tokens) if score == "norm" else lof_scores(tokens, n_neighbors)
    mask = outlier_mask(scores, contamination)
    if score == "either":
        mask = mask | outlier_mask(norm_scores(tokens), contamination)
    return Outliers(scores, mask)
