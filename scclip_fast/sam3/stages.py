"""The stages of the calibration on the trunk, the object queries and the mask head's features.

The trunk, with w = residual_weight. `last` is the trunk's last layer, which runs twice:

    x = output of the last layer but one      f_i = output of layer i
    outliers of x -- repair --> x', f_pre'    x' -- aggregate by f_pre' --> x''
    x <- x + w (x'' - x)
    y = last(x), with attention (1 - w) self + w content of f_pre'
    z = last(mean of f_start, ..., f_end-1)   y <- y + w (z - y)
    y <- y + w (aggregate by f_post (y) - y)

SC-CLIP, and the design document, add the sum of the middle layers. SAM3's neck was trained on the
frozen trunk, so here every stage enters as a blend, and the mean keeps the scale of one layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..calibration import Outliers, find_outliers
from ..ops import aggregate, repair
from .config import Sam3CalibrationConfig
from .state import ForwardState


def calibrate_trunk(
    x: Tensor, last: Callable[[Tensor, Tensor | None], Tensor], state: ForwardState
) -> Tensor:
    """Output (B, h, w, D) of the trunk's last layer by the module's equations.

    Args:
        x: (B, h, w, D), input of the last layer.
        last: the frozen last layer, of such an input and the features (B, N, D) of its content
            attention, or None for self-attention alone.
        state: holds the outputs of earlier layers, which are dropped, and receives the outliers and
            the calibrated features.
    """
    config, grid = state.config, (x.shape[1], x.shape[2])
    beta, w = config.similarity_beta, config.residual_weight
    tokens, pre = x.flatten(1, 2), state.pre
    changed, outliers = tokens, None
    if config.trunk_repair and (outliers := _outliers(tokens, config)):
        changed = repair(tokens, outliers.mask, grid)
        pre = None if pre is None else repair(pre, outliers.mask, grid)
    if config.trunk_aggregate:
        changed = aggregate(changed, pre, beta)
    content = pre if config.trunk_attention else None
    y = last(torch.lerp(tokens, changed, w).unflatten(1, grid), content)
    if config.trunk_fusion:
        mean = state.level_sum / len(config.fused_layers)
        y = torch.lerp(y, last(mean.unflatten(1, grid), content), w)
    y = y.flatten(1, 2)
    if config.trunk_aggregate:
        y = torch.lerp(y, aggregate(y, state.post, beta), w)
    state.pre = state.post = state.level_sum = None
    if outliers is not None:
        state.outlier_mask = outliers.mask.unflatten(1, grid)
        if config.outlier_score != "norm":
            state.lof_scores = outliers.scores.unflatten(1, grid)
    state.calibrated_features = y
    return y.unflatten(1, grid)


def aggregate_attended(attended: Tensor, tokens: Tensor, config: Sam3CalibrationConfig) -> Tensor:
    """Averages the attention of image tokens to a prompt over tokens that are similar.

    With the attention A, the prompt's values V and the row-normalised similarity S of the tokens,
    the result is ((1 - w) A + w S A) V = (1 - w) A V + w S (A V). No matrix of image tokens by
    prompt tokens is needed.

    Args:
        attended: (B, N, C), A V.
        tokens: (B, N, C), the queries of the attention.
    """
    similar = aggregate(attended, tokens, config.similarity_beta)
    return torch.lerp(attended, similar, config.residual_weight)


def calibrate_queries(queries: Tensor, config: Sam3CalibrationConfig) -> Tensor:
    """Aggregates the object queries (B, Q, C) of images that have outliers among them."""
    outliers = _outliers(queries, config)
    if outliers is None:
        return queries
    aggregated = aggregate(queries, queries, config.similarity_beta)
    return torch.where(outliers.mask.any(dim=1)[:, None, None], aggregated, queries)


def repair_map(features: Tensor, config: Sam3CalibrationConfig) -> Tensor:
    """Repairs the outlier pixels of feature maps (B, C, h, w)."""
    height, width = features.shape[-2:]
    tokens = features.flatten(2).mT
    outliers = _outliers(tokens, config)
    if outliers is None:
        return features
    repaired = repair(tokens, outliers.mask, (height, width))
    return repaired.mT.unflatten(2, (height, width))


def threshold_logits(
    logits: Tensor, query_norms: Tensor, pixel_norms: Tensor, beta: float
) -> Tensor:
    """Sets mask logits (B, Q, h, w) to 0 where the cosine of query and pixel is below beta.

    A logit is the unbounded dot product of a query's and a pixel's embedding. Divided by their
    norms (B, Q) and (B, h, w), it is the cosine that beta is compared with.
    """
    norms = query_norms[:, :, None, None] * pixel_norms[:, None]
    return torch.where(logits < beta * norms, 0, logits)


def check_pixels(name: str, pixels: Tensor) -> None:
    """ValueError unless all pixels are finite. On a GPU the check would wait, so it is left out."""
    if pixels.device.type == "cpu" and not torch.compiler.is_compiling():
        if not pixels.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity; check the images")


def _outliers(tokens: Tensor, config: Sam3CalibrationConfig) -> Outliers | None:
    k, contamination = config.outlier_n_neighbors, config.outlier_contamination
    return find_outliers(tokens, k, contamination, config.outlier_score)
