"""What is calibrated, against the ops: the trunk, the object queries, the mask head's features.

The trunk, w = residual_weight; `last` is the trunk's last layer, run twice:

    x = output of the last layer but one      f_i = output of layer i
    outliers of x -- repair --> x', f_pre'    x' -- aggregate by f_pre' --> x''
    x <- x + w (x'' - x)
    y = last(x), its attention (1 - w) self + w content of f_pre'
    z = last(mean of f_start, ..., f_end-1)   y <- y + w (z - y)
    y <- y + w (aggregate by f_post (y) - y)

The design this follows adds the sum of the middle layers, as SC-CLIP does; SAM3's neck was trained
on the frozen trunk, so everything enters as a blend, and the mean keeps its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..calibration import Outliers, find_outliers
from ..ops import aggregate, repair
from .config import Sam3CalibrationConfig


def calibrate_trunk(
    tokens: Tensor,
    features: Mapping[str, Tensor],
    last: Callable[[Tensor, Tensor | None], Tensor],
    grid: tuple[int, int],
    config: Sam3CalibrationConfig,
) -> tuple[Tensor, Outliers | None]:
    """The last layer's output (B, N, D) by the module's equations.

    Args:
        tokens: (B, N, D), the last layer's input.
        features: outputs (B, N, D) of earlier layers, as far as `config.taps` has them read: "pre",
            "post", and "levels", the sum of those from start to end - 1.
        last: the last layer of tokens, with the features of its content attention or None.
        grid: rows and columns of the tokens.

    Returns:
        Tokens, and the outliers found or, where there is no repair, None.
    """
    beta, w = config.similarity_beta, config.residual_weight
    pre, changed, outliers = features.get("pre"), tokens, None
    if config.trunk_repair and (outliers := _outliers(tokens, config)):
        changed = repair(tokens, outliers.mask, grid)
        pre = None if pre is None else repair(pre, outliers.mask, grid)
    if config.trunk_aggregate:
        changed = aggregate(changed, pre, beta)
    content = pre if config.trunk_attention else None
    y = last(torch.lerp(tokens, changed, w), content)
    if config.trunk_fusion:
        mean = features["levels"] / (config.multi_end_idx - config.multi_start_idx)
        y = torch.lerp(y, last(mean, content), w)
    if config.trunk_aggregate:
        y = torch.lerp(y, aggregate(y, features["post"], beta), w)
    return y, outliers


def aggregate_attended(attended: Tensor, tokens: Tensor, config: Sam3CalibrationConfig) -> Tensor:
    """The cross attention of image tokens to a prompt, averaged over tokens that look alike.

    With A the attention, V the prompt's values and S the row-normalised similarity of the tokens,
    the result is ((1 - w) A + w S A) V = (1 - w) A V + w S (A V): no matrix of the tokens by the
    prompt's is needed.

    Args:
        attended: (B, N, C), A V.
        tokens: (B, N, C), the queries of the attention.
    """
    similar = aggregate(attended, tokens, config.similarity_beta)
    return torch.lerp(attended, similar, config.residual_weight)


def calibrate_queries(queries: Tensor, config: Sam3CalibrationConfig) -> Tensor:
    """Object queries (B, Q, C), aggregated in the images that have outliers among them."""
    outliers = _outliers(queries, config)
    if outliers is None:
        return queries
    aggregated = aggregate(queries, queries, config.similarity_beta)
    return torch.where(outliers.mask.any(dim=1)[:, None, None], aggregated, queries)


def repair_map(features: Tensor, config: Sam3CalibrationConfig) -> Tensor:
    """Feature maps (B, C, h, w) with outlier pixels repaired."""
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
    """Mask logits (B, Q, h, w), 0 where the cosine of query and pixel is below beta.

    A logit is the dot product of a query's and a pixel's embedding, unbounded; over their norms
    (B, Q) and (B, h, w) it is the cosine that beta is for.
    """
    lengths = query_norms[:, :, None, None] * pixel_norms[:, None]
    return torch.where(logits < beta * lengths, 0, logits)


def _outliers(tokens: Tensor, config: Sam3CalibrationConfig) -> Outliers | None:
    k, contamination = config.outlier_n_neighbors, config.outlier_contamination
    return find_outliers(tokens, k, contamination, config.outlier_score)


def check_pixels(name: str, pixels: Tensor) -> None:
    """ValueError unless finite; on the CPU only: elsewhere it would wait for the device."""
    if pixels.device.type == "cpu" and not torch.compiler.is_compiling():
        if not pixels.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity; check the images")
