"""The last block of SC-CLIP and of the methods that it is compared with.

Each function takes a tower, the outputs (B, P + N, D) of all its blocks but the last, the grid
(h, w) and a configuration, and returns patch tokens (B, N, D) for `Tower.unit_features`. If the
tower has `corners`, the attention of the last block follows the idea of OV-Stitcher: a window's
queries attend to the keys of all windows. Repair and aggregation stay within a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration import find_outliers, scaled_index
from ..ops import aggregate, blended_attention, repair
from .config import SCCLIPConfig
from .tower import Tower

BlockOutputs = Sequence[Tensor]
Grid = tuple[int, int]

NACLIP_STD = 5.0  # patches
RESCLIP_LAYERS = 5, 8  # the first and the last, 0-based, of 12
RESCLIP_SHARE = 0.5
OMEGA_BYTES = 64 * 2**20  # of NACLIP's bias in memory at a time


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
    attended = tower.attention(q, q, v) + tower.attention(k, k, v)
    tokens = tower.add_residual_and_mlp(last, tokens, tower.merge_heads(last, attended))
    return tower.patches(tokens)


def clearclip(
    tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig
) -> Tensor:
    """ClearCLIP (Lan et al., ECCV 2024): query-query attention, no residual, no MLP."""
    last = tower.blocks[-1]
    q, _, v = tower.qkv(last, block_outputs[-1])
    return tower.patches(tower.merge_heads(last, tower.attention(q, q, v)))


def naclip(tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """NACLIP (Hajimiri et al., WACV 2025, arXiv 2404.08181): attention to keys and to neighbours.

    The weights are softmax(k k^T / sqrt d + omega), without residual and MLP. omega_ij = exp(-||p_i
    - p_j||^2 / (2 std^2)) for patches at p on the grid, and 0 for the tokens before them. std = 5
    patches as published.
    """
    last = tower.blocks[-1]
    _, k, v = tower.qkv(last, block_outputs[-1])
    return tower.merge_heads(last, neighbour_attention(tower, k, v, grid, NACLIP_STD))


def resclip(tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """ResCLIP's residual cross-correlation (Yang et al., CVPR 2025, arXiv 2411.15851).

    The weights of the last block are (1 - share) A_s + share A_c: A_s are those of `naclip`, and
    A_c is the mean of the query-key attention of the blocks 6 to 9 of 12, or of the blocks at these
    depths in other towers. share = 0.5; the published configurations of single benchmarks have
    shares of 0.3 to 0.6 and a factor of 2 on the weights, which the equation does not have. The
    paper's second module, which feeds the segmentation back, is left out: it needs the text.
    """
    last, layers = tower.blocks[-1], len(tower.blocks)
    _, k, v = tower.qkv(last, block_outputs[-1])
    first, end = (max(1, scaled_index(index, 12, layers)) for index in RESCLIP_LAYERS)
    n_prefix = v.shape[2] - grid[0] * grid[1]
    cross = torch.zeros_like(v[:, :, n_prefix:])
    for layer in range(first, end + 1):
        q_layer, k_layer, _ = tower.qkv(tower.blocks[layer], block_outputs[layer - 1])
        cross += tower.attention(q_layer[:, :, n_prefix:], k_layer, v)
    neighbours = neighbour_attention(tower, k, v, grid, NACLIP_STD)
    attended = torch.lerp(neighbours, cross / (end + 1 - first), RESCLIP_SHARE)
    return tower.merge_heads(last, attended)


def neighbour_attention(tower: Tower, k: Tensor, v: Tensor, grid: Grid, std: float) -> Tensor:
    """softmax(k k^T / sqrt d + omega) v for the patches, (B, heads, N, d); see `naclip`.

    Between the windows of one image, omega is that of the distance in the image.

    Args:
        k, v: (B, heads, P + N, d), the prefix tokens first.
        grid: (h, w), N = h w.
        std: standard deviation of the Gaussian, in patches.
    """
    rows, columns = (torch.arange(side, device=k.device) for side in grid)
    places = torch.cartesian_prod(rows, columns).to(torch.promote_types(k.dtype, torch.float32))
    n_prefix = k.shape[2] - len(places)
    of_keys = F.pad(places, (0, 0, n_prefix, 0), value=torch.inf)  # far from every patch
    if tower.corners is not None:
        corners = tower.corners[:, None]
        places, of_keys = ((corners + each).flatten(0, 1) for each in (places, of_keys))
    queries, k, v = map(tower.join, (k[:, :, n_prefix:], k, v))
    attended = []
    for some in places.split(max(1, OMEGA_BYTES // (len(of_keys) * k.element_size()))):
        vertical, horizontal = (
            torch.exp(-0.5 * ((some[:, None, axis] - of_keys[:, axis]) / std).square())
            for axis in (0, 1)
        )
        omega = vertical.to(k.dtype) * horizontal.to(k.dtype)
        start = sum(part.shape[2] for part in attended)
        part = queries[:, :, start : start + len(some)]
        attended.append(F.scaled_dot_product_attention(part, k, v, attn_mask=omega))
    return tower.part(torch.cat(attended, dim=2))


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
        q, k, v, middle = map(tower.join, (q, k, v, middle))
        attended = tower.part(blended_attention(q, k, v, middle, config.gamma, config.alpha))
    else:
        attended = tower.attention(q, k, v)
    return attended.unflatten(1, (branches.shape[1], -1)).transpose(2, 3).flatten(3)
