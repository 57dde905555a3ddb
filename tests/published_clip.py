"""SC-CLIP and its baselines as published, step by step on N x N matrices, for one image.

`cosines`, `aggregated`, `content_weights` and `blended` also take batches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from published_lof import lof_mask
from torch import Tensor


def embedding(visual, grid: tuple[int, int]) -> Tensor:
    """Stretches the positional embedding to (1 + h w, D), as SC-CLIP and DINO do."""
    old = visual.grid_size
    table = visual.positional_embedding[1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    factors = ((grid[0] + 0.1) / old[0], (grid[1] + 0.1) / old[1])
    table = F.interpolate(table, scale_factor=factors, mode="bicubic", antialias=False)
    assert table.shape[2:] == grid
    rows = [table[0, :, y, x] for y in range(grid[0]) for x in range(grid[1])]
    return torch.stack([visual.positional_embedding[0], *rows])


def layer_outputs(visual, image: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
    """Computes the outputs (1 + N, D) of all blocks but the last, and the grid, of a (3, H, W)."""
    patches = visual.conv1(image[None])[0]
    grid = tuple(patches.shape[1:])
    native = grid == tuple(visual.grid_size)
    table = visual.positional_embedding if native else embedding(visual, grid)
    tokens = torch.cat([visual.class_embedding[None], patches.reshape(len(patches), -1).T])
    tokens = visual.ln_pre(tokens + table)
    outputs = []
    for block in visual.transformer.resblocks[:-1]:
        tokens = block(tokens[None])[0]
        outputs.append(tokens)
    return outputs, grid


def cosines(features: Tensor) -> Tensor:
    """Computes S (..., N, N) of features (..., N, D)."""
    unit = F.normalize(features, dim=-1)
    return torch.matmul(unit, unit.mT)


def outlier_mask(x: Tensor, config) -> Tensor:
    """Computes the mask (N,) of the outliers by the setting `outlier_score`."""
    contamination = config.outlier_contamination
    norms = x.norm(dim=1)
    by_norm = norms > torch.quantile(norms, 1 - contamination)
    if config.outlier_score == "norm":
        return by_norm
    by_lof = lof_mask(x, config.outlier_n_neighbors, contamination)
    return by_lof | by_norm if config.outlier_score == "either" else by_lof


def repaired(tokens: Tensor, outliers: Tensor, height: int, width: int) -> Tensor:
    """Replaces each outlier by the mean of those of its up to 8 neighbours that are none."""
    fixed, listed = tokens.clone(), outliers.tolist()
    for index in outliers.nonzero()[:, 0].tolist():
        row, column = divmod(index, width)
        good = [
            y * width + x
            for y in range(max(row - 1, 0), min(row + 2, height))
            for x in range(max(column - 1, 0), min(column + 2, width))
            if not listed[y * width + x]
        ]
        if good:
            fixed[index] = tokens[good].mean(dim=0)
    return fixed


def aggregated(values: Tensor, similarity: Tensor, beta: float) -> Tensor:
    """Averages values (..., N, C) by the entries of S (..., N, N) that are at least beta."""
    similarity = torch.where(similarity < beta, 0, similarity)
    similarity = similarity / (similarity.sum(dim=-1, keepdim=True) + 1e-6)
    return torch.matmul(similarity, values)


def content_weights(similarity: Tensor, gamma: float) -> Tensor:
    """Computes C (..., N, N), the softmax of gamma (S - mean S) where that is positive."""
    logits = gamma * (similarity - similarity.mean(dim=(-2, -1), keepdim=True))
    return torch.softmax(logits.masked_fill(logits < 0, -torch.inf), dim=-1)


def blended(q: Tensor, k: Tensor, v: Tensor, content: Tensor, alpha: float) -> Tensor:
    """Attends with the weights (1 - alpha) softmax(q kT / sqrt d) + alpha C, all (..., N, N)."""
    weights = (1 - alpha) * softmax_scores(q, k) + alpha * content
    return torch.matmul(weights, v)


def split_heads(block, tokens: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Computes (q, k, v) of each head, (N, d), from tokens before the block's LayerNorm."""
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    qkv = (block.ln_1(tokens) @ weight.T + bias).chunk(3, dim=1)
    return list(zip(*(t.chunk(block.attn.num_heads, dim=1) for t in qkv), strict=True))


def softmax_scores(a: Tensor, b: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(a, b.mT) * a.shape[-1] ** -0.5, dim=-1)


def calibrated_attention(block, tokens: Tensor, similarity: Tensor, config) -> Tensor:
    content = content_weights(similarity, config.gamma)
    alpha = config.alpha if config.content_attention else 0.0
    heads = [
        blended(k if config.self_attention == "kk" else q, k, v, content, alpha)
        for q, k, v in split_heads(block, tokens)
    ]
    return block.attn.out_proj(torch.cat(heads, dim=1))


def scclip(visual, layers: list[Tensor], grid: tuple[int, int], config) -> Tensor:
    """Computes the two branches one after the other, each with its own aggregation."""
    last = visual.transformer.resblocks[-1]
    class_token, x = layers[-1][:1], layers[-1][1:]
    middle = layers[config.pre_adjust_idx][1:]
    if config.repair and len(x) > config.outlier_n_neighbors:
        outliers = outlier_mask(x, config)
        x, middle = repaired(x, outliers, *grid), repaired(middle, outliers, *grid)
    before, after = cosines(middle), cosines(layers[config.post_adjust_idx][1:])
    if config.pre_aggregate:
        x = aggregated(x, before, config.beta)
    branches = [(x, class_token)]
    if config.multi_level:
        levels = torch.stack(layers[config.multi_start_idx : config.multi_end_idx]).sum(dim=0)
        branches.append((levels[1:], levels[:1]))
    total = torch.zeros_like(x)
    for tokens, class_token in branches:
        out = calibrated_attention(last, tokens, before, config) + config.res_cls * class_token
        total += aggregated(out, after, config.beta) if config.post_aggregate else out
    return total


def baseline(visual, tokens: Tensor, method: str) -> Tensor:
    """Computes maskclip, sclip or clearclip from the tokens (1 + N, D) before the last block."""
    last = visual.transformer.resblocks[-1]
    mix = {
        "maskclip": lambda q, k: torch.eye(len(q), dtype=q.dtype),
        "sclip": lambda q, k: softmax_scores(q, q) + softmax_scores(k, k),
        "clearclip": lambda q, k: softmax_scores(q, q),
    }[method]
    heads = [mix(q, k) @ v for q, k, v in split_heads(last, tokens)]
    out = last.attn.out_proj(torch.cat(heads, dim=1))
    if method != "clearclip":
        out = tokens + last.ls_1(out)
        out = out + last.ls_2(last.mlp(last.ln_2(out)))
    return out[1:]


def encode_dense(model, image: Tensor, config, method: str = "scclip") -> Tensor:
    """Computes features (h, w, E) of unit norm from a (3, H, W) that the patch size divides."""
    visual = model.visual
    layers, grid = layer_outputs(visual, image)
    if method == "scclip":
        tokens = scclip(visual, layers, grid, config)
    else:
        tokens = baseline(visual, layers[-1], method)
    projected = visual.ln_post(tokens) @ visual.proj
    return (projected / projected.norm(dim=1, keepdim=True)).reshape(*grid, -1)
