"""The calibration of a SAM3 with the steps of `published_clip`, for one image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from published_clip import (
    aggregated,
    content_weights,
    cosines,
    outlier_mask,
    repaired,
    softmax_scores,
)

from scclip_fast.sam3.config import TRUNK_STAGES

# Each stage of the trunk alone, each together with repair, and all of them.
TRUNKS = [
    *((name,) for name in TRUNK_STAGES),
    *(("trunk_repair", name) for name in TRUNK_STAGES[1:]),
    TRUNK_STAGES,
]


def last_layer(layer, tokens, grid, content, config):
    """Runs a global layer of transformers' trunk on tokens (N, D), with `attended`."""
    from transformers.models.sam3.modeling_sam3 import apply_rotary_pos_emb_2d

    x = tokens.view(1, *grid, -1)
    normed = layer.layer_norm1(x)
    attention = layer.attention
    heads = attention.num_attention_heads

    def split(projection):
        return projection(normed).view(1, -1, heads, attention.head_dim).transpose(1, 2)

    q, k, v = (split(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    # transformers 5.0 stores the angles of the rotary embedding, later versions compute them.
    where = (normed, layer.position_ids) if hasattr(layer, "position_ids") else ()
    cos, sin = layer.rotary_emb(*where)
    q, k = apply_rotary_pos_emb_2d(q, k, cos=cos, sin=sin)
    out = attended(q, k, v, content, config)
    x = x + attention.o_proj(out.transpose(1, 2).reshape(1, *grid, -1))
    return (x + layer.mlp(layer.layer_norm2(x))).view(tokens.shape)


def last_block(block, tokens, grid, content, config):
    """Runs a global block of Meta's trunk on tokens (N, D), with `attended`."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(tokens)).view(len(tokens), 3, attn.num_heads, -1)
    q, k, v = qkv.permute(1, 2, 0, 3)
    q, k = (
        torch.view_as_real(torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2)) * attn.freqs_cis)
        for t in (q, k)
    )
    out = attended(q.flatten(-2), k.flatten(-2), v, content, config)
    x = tokens + attn.proj(out.transpose(0, 1).flatten(1))
    return x + block.mlp(block.norm2(x))


def attended(q, k, v, content, config):
    """Attends with weights that are blended with those of the content features, if given."""
    weights = softmax_scores(q, k)
    if content is not None:
        w = config.residual_weight
        weights = (1 - w) * weights + w * content_weights(cosines(content), config.gamma)
    return weights @ v


def trunk(backbone, pixels, config):
    """Computes the tokens (N, D) of an image (3, H, W), and the outlier mask (N,) or None."""
    x = backbone.embeddings(pixels[None])
    side = pixels.shape[-1] // backbone.config.patch_size
    x = backbone.layer_norm(x.view(1, side, side, -1))
    features = []
    for layer in backbone.layers[:-1]:
        x = layer(x)
        features.append(x.flatten(0, 2))
    grid = (side, side)

    def last(tokens, content):
        return last_layer(backbone.layers[-1], tokens, grid, content, config)

    return calibrated(features, last, grid, config)


def calibrated(features, last, grid, config):
    """Does the same from the outputs (N, D) of all layers but the last; `last` is that layer."""
    x, w = features[-1], config.residual_weight
    middle, new, mask = features[config.pre_adjust_idx], x, None
    if config.trunk_repair:
        mask = outlier_mask(x, config)
        new, middle = repaired(x, mask, *grid), repaired(middle, mask, *grid)
    if config.trunk_aggregate:
        new = aggregated(new, cosines(middle), config.similarity_beta)
    content = middle if config.trunk_attention else None
    y = last(x + w * (new - x), content)
    if config.trunk_fusion:
        levels = torch.stack(features[config.multi_start_idx : config.multi_end_idx]).mean(dim=0)
        y = y + w * (last(levels, content) - y)
    if config.trunk_aggregate:
        post = features[config.post_adjust_idx]
        y = y + w * (aggregated(y, cosines(post), config.similarity_beta) - y)
    return y, mask


def cross_attended(tokens, prompt, keep, projections, heads, config):
    """Image tokens (N, C) attend to a prompt (T, C); the weights are averaged over similar tokens.

    Args:
        keep: bool (T,), False for padding.
        projections: the projections to q, k, v and of the output.
    """
    *inner, outer = projections
    q, k, v = (
        projection(x).unflatten(-1, (heads, -1)).transpose(0, 1)
        for projection, x in zip(inner, (tokens, prompt, prompt), strict=True)
    )
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    w, beta = config.residual_weight, config.similarity_beta
    weights = (1 - w) * weights + w * aggregated(weights, cosines(tokens), beta)
    return outer((weights @ v).transpose(0, 1).flatten(1))


def queries(hidden, config):
    """Calibrates hidden states (1 + Q, C) of a decoder layer, whose presence token comes first."""
    q = hidden[1:]
    mask = outlier_mask(q, config)
    if mask.any():
        q = aggregated(q, cosines(q), config.similarity_beta)
    return torch.cat([hidden[:1], q])


def masks(mask_embeddings, pixels, config):
    """Computes logits (Q, h, w) from embeddings (Q, C) and pixel features (C, h, w)."""
    height, width = pixels.shape[1:]
    tokens = pixels.flatten(1).T
    if config.mask_repair and config.mask_grid == "pixels":
        mask = outlier_mask(tokens, config)
        tokens = repaired(tokens, mask, height, width)
    logits = mask_embeddings @ tokens.T
    if config.mask_threshold:
        cosine = F.normalize(mask_embeddings, dim=-1) @ F.normalize(tokens, dim=-1).T
        logits = torch.where(cosine < config.similarity_beta, 0, logits)
    return logits.view(-1, height, width)
