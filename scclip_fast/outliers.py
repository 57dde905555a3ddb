"""The outliers among tokens, where a model's calibration looks for them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .ops import lof_scores, outlier_mask


class Outliers(NamedTuple):
    """LOF scores (B, N) and the mask (B, N) of the outliers."""

    scores: Tensor
    mask: Tensor


def find_outliers(tokens: Tensor, n_neighbors: int, contamination: float) -> Outliers | None:
    """Of tokens (B, N, D); distances and scores are float32 at least.

    None of no more than n_neighbors tokens: where all others are neighbours, LOF says nothing, and
    the two that are farthest apart tie for the outlier.
    """
    if tokens.shape[1] <= n_neighbors:
        return None
    scores = lof_scores(tokens, n_neighbors)
    return Outliers(scores, outlier_mask(scores, contamination))
