"""Methods that take the similarity of patches from a proxy, a second frozen vision transformer.

Each function takes the arguments of those of `methods.py` and the proxy's features, and returns
features (B, h, w, E) in the space of the text, with h and w those of the proxy. If the tower has
`stitch`, the proxy's features are those of the whole image too.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..ops import content_attention
from .config import SCCLIPConfig
from .methods import BlockOutputs, Grid, maskclip
from .proxy import ProxyFeatures
from .tower import Tower

PROXYCLIP_GAMMA = 3.0
PROXYCLIP_BETA = 1.2  # times the mean similarity


def proxyclip(
    tower: Tower,
    block_outputs: BlockOutputs,
    grid: Grid,
    config: SCCLIPConfig,
    proxy: ProxyFeatures,
) -> Tensor:
    """ProxyCLIP (Lan et al., ECCV 2024, arXiv 2408.04883): attention by the proxy's similarities.

    The weights of the last block are softmax(gamma (S - beta mean S)) where that is not negative, S
    the cosine similarity of the proxy's tokens, the same for all heads; without residual and MLP.
    gamma = 3 and beta = 1.2 as published. The values are upsampled to the proxy's patches, which
    are the smaller ones in the paper. Unit vectors.
    """
    last = tower.blocks[-1]
    _, _, v = tower.qkv(last, tower.patches(block_outputs[-1]))
    values = resized(v.transpose(1, 2).flatten(2), tower.whole_grid(grid), proxy.grid)
    if values.shape[1] > 1:  # a single patch attends to itself
        threshold = ("mean", PROXYCLIP_BETA)
        values = content_attention(values, proxy.tokens, PROXYCLIP_GAMMA, threshold)
    return tower.unit_features(tower.out_proj(last, values)).unflatten(1, proxy.grid)


def lposs(
    tower: Tower,
    block_outputs: BlockOutputs,
    grid: Grid,
    config: SCCLIPConfig,
    proxy: ProxyFeatures,
) -> Tensor:
    """LPOSS (Stojnic et al., CVPR 2025, arXiv 2503.19777): MaskCLIP at the proxy's patches.

    `Segmenter` propagates the cosines of these features along the proxy's similarities, see
    `segment.propagation`. The tokens are the output of the proxy, where the paper takes the values
    of the last block of DINO ViT-B/16. Unit vectors.
    """
    projected = tower.norm_and_project(maskclip(tower, block_outputs, grid, config))
    projected = resized(projected, tower.whole_grid(grid), proxy.grid)
    return F.normalize(projected, dim=-1).unflatten(1, proxy.grid)


def resized(tokens: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Tokens (B, h' w', D) of another grid, resized bilinearly from tokens (B, h w, D)."""
    if grid == size:
        return tokens
    feature_map = tokens.mT.unflatten(2, grid)
    return F.interpolate(feature_map, size, mode="bilinear").flatten(2).mT
