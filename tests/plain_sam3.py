"""The calibration of a SAM3 written out: one image, explicit matrices, loops over outliers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.models.sam3.modeling_sam3 import apply_rotary_pos_emb_2d


def outliers(x, k, contamination):
    """Of tokens (N, D): scores and mask, from the differences of all pairs."""
    squared = (x[:, None] - x[None]).square().sum(dim=-1)
    squared.fill_diagonal_(torch.inf)
    nearest, indices = squared.topk(k, largest=False)
    kappa = nearest[:, -1]
    scores = (kappa[:, None] / kappa[indices]).mean(dim=1)
    return scores, scores > torch.quantile(scores, 1 - contamination)


def repaired(x, mask, height, width):
    out = x.clone()
    for token in mask.nonzero()[:, 0].tolist():
        row, column = divmod(token, width)
        around = [
            r * width + c
            for r in range(max(0, row - 1), min(height, row + 2))
            for c in range(max(0, column - 1), min(width, column + 2))
        ]
        good = [other for other in around if not mask[other]]
        if good:
            out[token] = x[good].mean(dim=0)
    return out


def aggregated(values, features, beta):
    unit = F.normalize(features, dim=-1)
    s = unit @ unit.T
    s = torch.where(s < beta, 0, s)
    return s / (s.sum(dim=1, keepdim=True) + 1e-6) @ values


def content_weights(features, gamma):
    unit = F.normalize(features, dim=-1)
    s = unit @ unit.T
    centred = s - s.mean()
    return torch.softmax((gamma * centred).masked_fill(centred < 0, -torch.inf), dim=-1)


def last_layer(layer, tokens, grid, content, config):
    """A global layer of the trunk on tokens (N, D), its attention blended with the content's."""
    x = tokens.view(1, *grid, -1)
    normed = layer.layer_norm1(x)
    attention = layer.attention
    heads = attention.num_attention_heads

    def split(projection):
        return projection(normed).view(1, -1, heads, attention.head_dim).transpose(1, 2)

    q, k, v = (split(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    # transformers 5.0 keeps the angles, later ones make them.
    where = (normed, layer.position_ids) if hasattr(layer, "position_ids") else ()
    cos, sin = layer.rotary_emb(*where)
    q, k = apply_rotary_pos_emb_2d(q, k, cos=cos, sin=sin)
    weights = torch.softmax(q @ k.mT * attention.head_dim**-0.5, dim=-1)
    if content is not None:
        w = config.residual_weight
        weights = (1 - w) * weights + w * content_weights(content, config.gamma)
    out = attention.o_proj((weights @ v).transpose(1, 2).reshape(1, *grid, -1))
    x = x + out
    return (x + layer.mlp(layer.layer_norm2(x))).view(tokens.shape)


def trunk(backbone, pixels, config):
    """Tokens (N, D) of one image (3, H, W), and the outlier mask (N,) or None."""
    x = backbone.embeddings(pixels[None])
    side = pixels.shape[-1] // backbone.config.patch_size
    x = backbone.layer_norm(x.view(1, side, side, -1))
    features = []
    for layer in backbone.layers[:-1]:
        x = layer(x)
        features.append(x.flatten(0, 2))
    x, grid, w = features[-1], (side, side), config.residual_weight
    middle, new, mask = features[config.pre_adjust_idx], x, None
    if config.trunk_repair:
        _, mask = outliers(x, config.outlier_n_neighbors, config.outlier_contamination)
        new, middle = repaired(x, mask, *grid), repaired(middle, mask, *grid)
    if config.trunk_aggregate:
        new = aggregated(new, middle, config.similarity_beta)
    content = middle if config.trunk_attention else None
    y = last_layer(backbone.layers[-1], x + w * (new - x), grid, content, config)
    if config.trunk_fusion:
        levels = torch.stack(features[config.multi_start_idx : config.multi_end_idx]).mean(dim=0)
        y = y + w * (last_layer(backbone.layers[-1], levels, grid, content, config) - y)
    if config.trunk_aggregate:
        post = features[config.post_adjust_idx]
        y = y + w * (aggregated(y, post, config.similarity_beta) - y)
    return y, mask


def queries(hidden, config):
    """Hidden states (1 + Q, C) of a decoder layer, the presence token first."""
    q = hidden[1:]
    _, mask = outliers(q, config.outlier_n_neighbors, config.outlier_contamination)
    if mask.any():
        q = aggregated(q, q, config.similarity_beta)
    return torch.cat([hidden[:1], q])


def masks(mask_embeddings, pixels, config):
    """Logits (Q, h, w) of embeddings (Q, C) and pixel features (C, h, w)."""
    height, width = pixels.shape[1:]
    tokens = pixels.flatten(1).T
    if config.mask_repair and config.mask_grid == "pixels":
        _, mask = outliers(tokens, config.outlier_n_neighbors, config.outlier_contamination)
        tokens = repaired(tokens, mask, height, width)
    logits = mask_embeddings @ tokens.T
    if config.mask_threshold:
        cosine = F.normalize(mask_embeddings, dim=-1) @ F.normalize(tokens, dim=-1).T
        logits = torch.where(cosine < config.similarity_beta, 0, logits)
    return logits.view(-1, height, width)
