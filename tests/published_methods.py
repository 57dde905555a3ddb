"""The methods beside SC-CLIP as published, step by step on N x N matrices, for one image.

`layers` are the outputs (1 + N, D) of all blocks but the last, from `published_clip.layer_outputs`.
"""

from __future__ import annotations

import math

import torch
from published_clip import softmax_scores, split_heads
from torch import Tensor


def naclip_weights(k: Tensor, grid: tuple[int, int]) -> Tensor:
    """Computes softmax(k kT / sqrt d + omega), (1 + N, 1 + N), an entry of omega at a time."""
    scores = k @ k.mT * k.shape[-1] ** -0.5
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    for i, (y, x) in enumerate(places, start=1):
        for j, (other_y, other_x) in enumerate(places, start=1):
            scores[i, j] += math.exp(-((y - other_y) ** 2 + (x - other_x) ** 2) / (2 * 5**2))
    return torch.softmax(scores, dim=-1)


def naclip(visual, layers: list[Tensor], grid: tuple[int, int]) -> Tensor:
    last = visual.transformer.resblocks[-1]
    heads = [naclip_weights(k, grid) @ v for _, k, v in split_heads(last, layers[-1])]
    return last.attn.out_proj(torch.cat(heads, dim=1))[1:]


def resclip(visual, layers: list[Tensor], grid: tuple[int, int], middle: list[int]) -> Tensor:
    """Computes the residual cross-correlation with the attention of the blocks `middle`."""
    blocks = visual.transformer.resblocks
    cross = torch.stack(
        [
            torch.stack([softmax_scores(q, k) for q, k, _ in split_heads(blocks[i], layers[i - 1])])
            for i in middle
        ]
    ).mean(dim=0)
    heads = [
        (0.5 * naclip_weights(k, grid) + 0.5 * cross[head]) @ v
        for head, (_, k, v) in enumerate(split_heads(blocks[-1], layers[-1]))
    ]
    return blocks[-1].attn.out_proj(torch.cat(heads, dim=1))[1:]


def upsampled_tokens(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resizes tokens (N, D) of a grid to another one, as torch does half-pixel bilinear."""
    maps = tokens.T.reshape(1, -1, *grid)
    maps = torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)
    return maps[0].flatten(1).T


def proxyclip(visual, layers: list[Tensor], grid: tuple[int, int], features: Tensor) -> Tensor:
    """Computes tokens (N', D) from the proxy's features (D', h', w'), N' = h' w'."""
    last = visual.transformer.resblocks[-1]
    v = torch.cat([v for _, _, v in split_heads(last, layers[-1][1:])], dim=1)
    v = upsampled_tokens(v, grid, features.shape[1:])
    x = features.flatten(1).T
    x = x / x.norm(dim=1, keepdim=True)
    similarity = x @ x.T
    logits = 3 * (similarity - 1.2 * similarity.mean())
    logits = logits.masked_fill(logits < 0, -torch.inf)
    return last.attn.out_proj(torch.softmax(logits, dim=1) @ v)
