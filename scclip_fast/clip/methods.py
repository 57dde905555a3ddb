"""What becomes of the patch tokens in the last block: SC-CLIP, and the methods it is compared with.

Each function takes a tower, the outputs of all blocks but its last, (B, 1 + N, D) each, the grid
(h, w) and a configuration, and gives patch tokens (B, N, D) for the tower's projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration import find_outliers
from ..ops import aggregate, blended_attention, repair
from .config import SCCLIPConfig
from .tower import Tower

Grid = tuple[int, int]
Layers = Sequence[Tensor]


def clip(tower: Tower, layers: Layers, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """CLIP as it was trained."""
    return tower.block(tower.blocks[-1], layers[-1])[:, 1:]


def maskclip(tower: Tower, layers: Layers, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """MaskCLIP (Zhou et al., ECCV 2022): every token attends to itself alone."""
    last, patches = tower.blocks[-1], layers[-1][:, 1:]
    _, _, v = tower.heads(last, patches)
    return tower.finish(last, patches, tower.merge(last, v))


def sclip(tower: Tower, layers: Layers, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """SCLIP (Wang et al., ECCV 2024): query-query plus key-key attention."""
    last, tokens = tower.blocks[-1], layers[-1]
    q, k, v = tower.heads(last, tokens)
    attention = F.scaled_dot_product_attention
    attended = attention(q, q, v) + attention(k, k, v)
    return tower.finish(last, tokens, tower.merge(last, attended))[:, 1:]


def clearclip(tower: Tower, layers: Layers, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """ClearCLIP (Lan et al., ECCV 2024): query-query attention, no residual, no MLP."""
    last = tower.blocks[-1]
    q, _, v = tower.heads(last, layers[-1])
    return tower.merge(last, F.scaled_dot_product_attention(q, q, v))[:, 1:]


def scclip(tower: Tower, layers: Layers, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """SC-CLIP (Bai et al., arXiv 2411.15869), with the two branches as one.

    Attention, output projection and aggregation are linear in the values, so that both branches go
    through one attention as extra heads, are added before the output projection, and are aggregated
    once.
    """
    if layers[-1].shape[1] == 2 and layers[-1].shape[0] > 1:  # one patch: the ops refuse a batch
        images = zip(*(layer.split(1) for layer in layers), strict=True)
        return torch.cat([scclip(tower, image, grid, config) for image in images])
    class_token, patches = layers[-1].split([1, layers[-1].shape[1] - 1], dim=1)
    middle = layers[config.pre_adjust_idx][:, 1:]
    if config.repair:
        k, contamination = config.outlier_n_neighbors, config.outlier_contamination
        outliers = find_outliers(patches, k, contamination, config.outlier_score)
        if outliers is not None:
            patches, middle = (repair(t, outliers.mask, grid) for t in (patches, middle))
    if config.pre_aggregate:
        patches = aggregate(patches, middle, config.beta)
    branches = [patches]
    if config.multi_level:
        levels = sum(layers[config.multi_start_idx : config.multi_end_idx])
        branches.append(levels[:, 1:])
        class_token = class_token + levels[:, :1]
    attended = _attend(tower, torch.stack(branches, dim=1), middle, config)
    output = tower.output(tower.blocks[-1])
    dense = output(attended.sum(dim=1))
    if config.multi_level:  # the bias of the second projection
        dense = dense + output.bias
    dense = dense + config.res_cls * class_token
    if config.post_aggregate:
        dense = aggregate(dense, layers[config.post_adjust_idx][:, 1:], config.beta)
    return dense


def _attend(tower: Tower, branches: Tensor, middle: Tensor, config: SCCLIPConfig) -> Tensor:
    """The last block's blended attention on branches (B, S, N, D), heads merged."""
    heads = tower.heads(tower.blocks[-1], branches)
    q, k, v = (head.flatten(1, 2) for head in heads)  # (B, S heads, N, d)
    q = k if config.self_attention == "kk" else q
    if config.content_attention:
        attended = blended_attention(q, k, v, middle, config.gamma, config.alpha)
    else:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.unflatten(1, (branches.shape[1], -1)).transpose(2, 3).flatten(3)
