"""The last block of SC-CLIP and of the methods that it is compared with.

Each function takes a tower, the outputs (B, P + N, D) of all its blocks but the last, the grid
(h, w) and a configuration, and returns tokens for `Tower.unit_features`, of which the last N are
those of the patches. If the tower has `stitch`, the outputs are those of the windows of one image,
and the result has its patches: the last block attends to the whole image, see `stitch.py`.
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
    return tower.run_block(tower.blocks[-1], block_outputs[-1])


def maskclip(tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """MaskCLIP (Zhou et al., ECCV 2022): every token attends to itself alone."""
    last, patches = tower.blocks[-1], tower.patches(block_outputs[-1])
    _, _, v = tower.qkv(last, patches)
    return tower.add_residual_and_mlp(last, tower.whole(patches), tower.merge_heads(last, v))


def sclip(tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """SCLIP (Wang et al., ECCV 2024): query-query plus key-key attention."""
    last, tokens = tower.blocks[-1], block_outputs[-1]
    q, k, v = tower.qkv(last, tokens)
    attended = sum(F.scaled_dot_product_attention(t, t, v) for t in (q, k))
    return tower.add_residual_and_mlp(last, tower.whole(tokens), tower.merge_heads(last, attended))


def clearclip(
    tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig
) -> Tensor:
    """ClearCLIP (Lan et al., ECCV 2024): query-query attention, no residual, no MLP."""
    last = tower.blocks[-1]
    q, _, v = tower.qkv(last, block_outputs[-1])
    return tower.merge_heads(last, F.scaled_dot_product_attention(q, q, v))


def naclip(tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """NACLIP (Hajimiri et al., WACV 2025, arXiv 2404.08181): attention to keys and to neighbours.

    The weights are softmax(k k^T / sqrt d + omega), without residual and MLP. omega_ij = exp(-||p_i
    - p_j||^2 / (2 std^2)) for patches at p on the grid, and 0 for the tokens before them. std = 5
    patches as published.
    """
    last = tower.blocks[-1]
    _, k, v = tower.qkv(last, block_outputs[-1])
    return tower.merge_heads(last, neighbour_attention(k, v, tower.whole_grid(grid), NACLIP_STD))


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
    grid = tower.whole_grid(grid)
    n_prefix = v.shape[2] - grid[0] * grid[1]
    cross = torch.zeros_like(v[:, :, n_prefix:])
    for layer in range(first, end + 1):
        q_layer, k_layer, _ = tower.qkv(tower.blocks[layer], block_outputs[layer - 1])
        cross += F.scaled_dot_product_attention(q_layer[:, :, n_prefix:], k_layer, v)
    neighbours = neighbour_attention(k, v, grid, NACLIP_STD)
    attended = torch.lerp(neighbours, cross / (end + 1 - first), RESCLIP_SHARE)
    return tower.merge_heads(last, attended)


def neighbour_attention(k: Tensor, v: Tensor, grid: Grid, std: float) -> Tensor:
    """softmax(k k^T / sqrt d + omega) v for the patches, (B, heads, N, d); see `naclip`.

    Args:
        k, v: (B, heads, P + N, d), the prefix tokens first.
        grid: (h, w), N = h w.
        std: standard deviation of the Gaussian, in patches.
    """
    n_prefix = k.shape[2] - grid[0] * grid[1]
    vertical, horizontal = (_gaussian(side, std, k) for side in grid)
    row_bytes = grid[1] * k.shape[2] * k.element_size()  # of omega for one row of patches
    step = max(1, OMEGA_BYTES // row_bytes)
    attended = []
    for top in range(0, grid[0], step):
        omega = vertical[top : top + step, None, :, None] * horizontal[None, :, None, :]
        omega = F.pad(omega.flatten(2).flatten(0, 1), (n_prefix, 0))  # [rows, P + N]
        start = n_prefix + top * grid[1]
        queries = k[:, :, start : start + len(omega)]
        attended.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=omega))
    return torch.cat(attended, dim=2)


def _gaussian(side: int, std: float, like: Tensor) -> Tensor:
    """exp(-(i - j)^2 / (2 std^2)), (side, side), in the dtype and on the device of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    position = torch.arange(side, device=like.device, dtype=dtype)
    distance = (position[:, None] - position) / std
    return torch.exp(-0.5 * distance.square()).to(like.dtype)


def scclip(tower: Tower, block_outputs: BlockOutputs, grid: Grid, config: SCCLIPConfig) -> Tensor:
    """SC-CLIP (Bai et al., arXiv 2411.15869), with the two branches as one.

    Attention and aggregation are linear in the values. So both branches go through one attention as
    extra heads, are added after the output projection, and are aggregated once. A model without a
    class token adds none. Of the windows of an image, each is repaired and aggregated alone before
    the last block, and its class token is added to its patches.
    """
    class_token, patches = tower.class_token(block_outputs[-1]), tower.patches(block_outputs[-1])
    batch, n_patches = patches.shape[:2]
    if n_patches == 1 and batch > 1 and tower.stitch is None:  # the ops refuse a batch of these
        images = zip(*(output.split(1) for output in block_outputs), strict=True)
        return torch.cat([scclip(tower, image, grid, config) for image in images])
    middle = tower.patches(block_outputs[config.pre_adjust_idx])
    if config.repair:
        k, contamination = config.outlier_n_neighbors, config.outlier_contamination
        outliers = find_outliers(patches, k, contamination, config.outlier_score)
        if outliers is not None:
            patches, middle = (repair(t, outliers.mask, grid) for t in (patches, middle))
    if config.pre_aggregate and (n_patches > 1 or batch == 1):  # a single patch keeps itself
        patches = aggregate(patches, middle, config.beta)
    branches = [patches]
    if config.multi_level:
        level_sum = sum(block_outputs[config.multi_start_idx : config.multi_end_idx])
        branches.append(tower.patches(level_sum))
        class_token = class_token + tower.class_token(level_sum)
    attended = _attend(tower, torch.stack(branches, dim=1), tower.whole(middle), config)
    class_token = tower.whole(class_token.expand(-1, n_patches, -1))
    dense = tower.out_proj(tower.blocks[-1], attended).sum(dim=1) + config.res_cls * class_token
    if config.post_aggregate:
        post = tower.whole(tower.patches(block_outputs[config.post_adjust_idx]))
        dense = aggregate(dense, post, config.beta)
    return dense


def _attend(tower: Tower, branches: Tensor, middle: Tensor, config: SCCLIPConfig) -> Tensor:
    """The last block's blended attention on S branches (B, S, N, D), its heads concatenated.

    `middle` has the patches of the result, which are those of the whole image with `stitch`.
    """
    heads = tower.qkv(tower.blocks[-1], branches)
    q, k, v = (head.flatten(1, 2) for head in heads)  # (B, S heads, N, d)
    q = k if config.self_attention == "kk" else q
    if config.content_attention:
        attended = blended_attention(q, k, v, middle, config.gamma, config.alpha)
    else:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.unflatten(1, (branches.shape[1], -1)).transpose(2, 3).flatten(3)
