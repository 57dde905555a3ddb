"""The last block of SC-CLIP and of the methods that it is compared with.

Each function takes a tower, the outputs (B, P + N, D) of all its blocks but the last, the grid
(h, w) and a configuration, and returns patch tokens (B, N, D) for `Tower.unit_features`.
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

BlockOutputs = Sequence[Tensor]
Grid = tuple[int, int]


def clip(tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """CLIP as it was trained."""
    return tower.patches(tower.run_block(tower.blocks[-1], block_outputs[-1]))


def maskclip(tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """MaskCLIP (Zhou et al., ECCV 2022): every token attends to itself alone."""
    last, patches = tower.blocks[-1], tower.patches(block_outputs[-1])
    _, _, v = tower.qkv(last, patches)
    return tower.add_residual_and_mlp(last, patches, tower.merge_heads(last, v))


def sclip(tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """SCLIP (Wang et al., ECCV 2024): query-query plus key-key attention."""
    last, tokens = tower.blocks[-1], block_outputs[-1]
    q, k, v = tower.qkv(last, tokens)
    attention = F.scaled_dot_product_attention
    attended = attention(q, q, v) + attention(k, k, v)
    tokens = tower.add_residual_and_mlp(last, tokens, tower.merge_heads(last, attended))
    return tower.patches(tokens)


def clearclip(
    tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig
) -> Tensor:
    """ClearCLIP (Lan et al., ECCV 2024): query-query attention, no residual, no MLP."""
    last = tower.blocks[-1]
    q, _, v = tower.qkv(last, block_outputs[-1])
    return tower.patches(tower.merge_heads(last, F.scaled_dot_product_attention(q, q, v)))


def scclip(tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """SC-CLIP (Bai et al., arXiv 2411.15869), with the two branches as one.

    Attention and aggregation are linear in the values. So both branches go through one attention as
    extra heads, are added after the output projection, and are aggregated once. A model without a
    class token adds none.
    """
    class_token, patches = tower.class_token(block_outputs[-1]), tower.patches(block_outputs[-1])
    batch, n_patches = patches.shape[:2]
    if n_patches == 1 and batch > 1:  # one patch an image: the ops refuse a batch of such images
        images = zip(*(output.split(1) for output in block_outputs), strict=True)
        return torch.cat([scclip(tower, image, grid, config) for image in images])
    middle = tower.patches(block_outputs[config.pre_adjust_idx])
    if config.repair:
        k, contamination = config.outlier_n_neighbors, config.outlier_contamination
        outliers = find_outliers(patches, k, contamination, config.outlier_score)
        if outliers is not None:
            patches, middle = (repair(t, outliers.mask, grid) for t in (patches, middle))
    if config.pre_aggregate:
        patches = aggregate(patches, middle, config.beta)
    branches = [patches]
    if config.multi_level:
        level_sum = sum(block_outputs[config.multi_start_idx : config.multi_end_idx])
        branches.append(tower.patches(level_sum))
        class_token = class_token + tower.class_token(level_sum)
    attended = _attend(tower, torch.stack(branches, dim=1), middle, config)
    dense = tower.out_proj(tower.blocks[-1], attended).sum(dim=1) + config.res_cls * class_token
    if config.post_aggregate:
        post = tower.patches(block_outputs[config.post_adjust_idx])
        dense = aggregate(dense, post, config.beta)
    return dense


def _attend(tower: Tower, branches: Tensor, middle: Tensor, config: SCCLIPConfig) -> Tensor:
    """The last block's blended attention on S branches (B, S, N, D), its heads concatenated."""
    heads = tower.qkv(tower.blocks[-1], branches)
    q, k, v = (head.flatten(1, 2) for head in heads)  # (B, S heads, N, d)
    q = k if config.self_attention == "kk" else q
    if config.content_attention:
        attended = blended_attention(q, k, v, middle, config.gamma, config.alpha)
    else:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.unflatten(1, (branches.shape[1], -1)).transpose(2, 3).flatten(3)
