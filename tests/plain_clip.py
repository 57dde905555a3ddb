"""SC-CLIP and the methods beside it for one image, step by step as published, on N x N matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(visual, grid: tuple[int, int]) -> Tensor:
    """The positional embedding (1 + h w, D) stretched as SC-CLIP (and DINO) do."""
    old = visual.grid_size
    table = visual.positional_embedding[1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    factors = ((grid[0] + 0.1) / old[0], (grid[1] + 0.1) / old[1])
    table = F.interpolate(table, scale_factor=factors, mode="bicubic", antialias=False)
    assert table.shape[2:] == grid
    rows = [table[0, :, y, x] for y in range(grid[0]) for x in range(grid[1])]
    return torch.stack([visual.positional_embedding[0], *rows])


def layer_outputs(visual, image: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
    """What each block but the last gives, (1 + N, D), and the grid, of an image (3, H, W)."""
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
    unit = features / features.norm(dim=1, keepdim=True)
    return unit @ unit.T


def lof_outliers(x: Tensor, k: int, contamination: float) -> Tensor:
    distances = (x[:, None] - x).square().sum(dim=2)
    distances.fill_diagonal_(torch.inf)
    nearest, neighbors = distances.topk(k, largest=False)
    k_distance = nearest[:, -1]
    scores = (k_distance[:, None] / k_distance[neighbors]).mean(dim=1)
    return scores > torch.quantile(scores, 1 - contamination)


def found_outliers(x: Tensor, config) -> Tensor:
    contamination = config.outlier_contamination
    norms = x.norm(dim=1)
    by_norm = norms > torch.quantile(norms, 1 - contamination)
    if config.outlier_score == "norm":
        return by_norm
    by_lof = lof_outliers(x, config.outlier_n_neighbors, contamination)
    return by_lof | by_norm if config.outlier_score == "either" else by_lof


def repaired(tokens: Tensor, outliers: Tensor, grid: tuple[int, int]) -> Tensor:
    """Outliers become the mean of those of their up to 8 neighbours that are none."""
    height, width = grid
    fixed = tokens.clone()
    for index in outliers.nonzero()[:, 0].tolist():
        row, column = divmod(index, width)
        good = [
            tokens[y * width + x]
            for y in range(max(row - 1, 0), min(row + 2, height))
            for x in range(max(column - 1, 0), min(column + 2, width))
            if not outliers[y * width + x]
        ]
        if good:
            fixed[index] = torch.stack(good).mean(dim=0)
    return fixed


def aggregated(tokens: Tensor, similarity: Tensor, beta: float) -> Tensor:
    kept = similarity * (similarity >= beta)
    return kept / (kept.sum(dim=1, keepdim=True) + 1e-6) @ tokens


def split_heads(block, tokens: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) of each head, (N, d), for normed tokens."""
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    q, k, v = (block.ln_1(tokens) @ weight.T + bias).chunk(3, dim=1)
    heads = block.attn.num_heads
    parts = (t.chunk(heads, dim=1) for t in (q, k, v))
    return list(zip(*parts, strict=True))


def softmax_scores(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] ** 0.5).softmax(dim=1)


def calibrated_attention(block, tokens: Tensor, similarity: Tensor, config) -> Tensor:
    content = config.gamma * (similarity - similarity.mean())
    content = content.masked_fill(content < 0, -torch.inf).softmax(dim=1)
    alpha = config.alpha if config.content_attention else 0.0
    heads = []
    for q, k, v in split_heads(block, tokens):
        own = softmax_scores(k if config.self_attention == "kk" else q, k)
        heads.append(((1 - alpha) * own + alpha * content) @ v)
    return block.attn.out_proj(torch.cat(heads, dim=1))


def scclip(visual, layers: list[Tensor], grid: tuple[int, int], config) -> Tensor:
    """The two branches one after the other, each aggregated on its own."""
    last = visual.transformer.resblocks[-1]
    class_token, x = layers[-1][:1], layers[-1][1:]
    middle = layers[config.pre_adjust_idx][1:]
    if config.repair and len(x) > config.outlier_n_neighbors:
        outliers = found_outliers(x, config)
        x, middle = repaired(x, outliers, grid), repaired(middle, outliers, grid)
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
    """maskclip, sclip or clearclip from the tokens (1 + N, D) before the last block."""
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
    """(h, w, E), unit norm, of an image (3, H, W) whose sides the patch size divides."""
    visual = model.visual
    layers, grid = layer_outputs(visual, image)
    if method == "scclip":
        tokens = scclip(visual, layers, grid, config)
    else:
        tokens = baseline(visual, layers[-1], method)
    projected = visual.ln_post(tokens) @ visual.proj
    return (projected / projected.norm(dim=1, keepdim=True)).reshape(*grid, -1)
