"""The calibration of a SAM3 written out: one image, explicit matrices, loops over outliers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scclip_fast.sam3.config import TRUNK_STAGES

# Each stage of the trunk alone, beside repair, and all of them.
TRUNKS = [
    *((name,) for name in TRUNK_STAGES),
    *(("trunk_repair", name) for name in TRUNK_STAGES[1:]),
    TRUNK_STAGES,
]


def outliers(x, k, contamination):
    """Of tokens (N, D): scores and mask, from the differences of all pairs."""
    squared = (x[:, None] - x[None]).square().sum(dim=-1)
    squared.fill_diagonal_(torch.inf)
    nearest, indices = squared.topk(k, largest=False)
    kappa = nearest[:, -1]
    scores = (kappa[:, None] / kappa[indices]).mean(dim=1)
    return scores, scores > torch.quantile(scores, 1 - contamination)


def found_outliers(x, config):
    """Mask (N,) of the outliers by the setting `outlier_score`."""
    _, by_lof = outliers(x, config.outlier_n_neighbors, config.outlier_contamination)
    norms = x.norm(dim=-1)
    by_norm = norms > torch.quantile(norms, 1 - config.outlier_contamination)
    return {"lof": by_lof, "norm": by_norm, "either": by_lof | by_norm}[config.outlier_score]


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
    from transformers.models.sam3.modeling_sam3 import apply_rotary_pos_emb_2d

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
    out = attended(q, k, v, content, config)
    x = x + attention.o_proj(out.transpose(1, 2).reshape(1, *grid, -1))
    return (x + layer.mlp(layer.layer_norm2(x))).view(tokens.shape)


def last_block(block, tokens, grid, content, config):
    """The same of Meta's package."""
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
    weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    if content is not None:
        w = config.residual_weight
        weights = (1 - w) * weights + w * content_weights(content, config.gamma)
    return weights @ v


def trunk(backbone, pixels, config):
    """Tokens (N, D) of one image (3, H, W), and the outlier mask (N,) or None."""
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
    """The same from the outputs (N, D) of all layers but the last, which is `last`."""
    x, w = features[-1], config.residual_weight
    middle, new, mask = features[config.pre_adjust_idx], x, None
    if config.trunk_repair:
        mask = found_outliers(x, config)
        new, middle = repaired(x, mask, *grid), repaired(middle, mask, *grid)
    if config.trunk_aggregate:
        new = aggregated(new, middle, config.similarity_beta)
    content = middle if config.trunk_attention else None
    y = last(x + w * (new - x), content)
    if config.trunk_fusion:
        levels = torch.stack(features[config.multi_start_idx : config.multi_end_idx]).mean(dim=0)
        y = y + w * (last(levels, content) - y)
    if config.trunk_aggregate:
        post = features[config.post_adjust_idx]
        y = y + w * (aggregated(y, post, config.similarity_beta) - y)
    return y, mask


def cross_attended(tokens, prompt, keep, projections, heads, config):
    """Image tokens (N, C) attend to a prompt (T, C), with weights averaged over tokens alike.

    keep (T,) bool leaves out padding; projections are those of q, k, v and the output.
    """
    *inner, outer = projections
    q, k, v = (
        projection(x).unflatten(-1, (heads, -1)).transpose(0, 1)
        for projection, x in zip(inner, (tokens, prompt, prompt), strict=True)
    )
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    w, beta = config.residual_weight, config.similarity_beta
    weights = (1 - w) * weights + w * aggregated(weights, tokens, beta)
    return outer((weights @ v).transpose(0, 1).flatten(1))


def queries(hidden, config):
    """Hidden states (1 + Q, C) of a decoder layer, the presence token first."""
    q = hidden[1:]
    mask = found_outliers(q, config)
    if mask.any():
        q = aggregated(q, q, config.similarity_beta)
    return torch.cat([hidden[:1], q])


def masks(mask_embeddings, pixels, config):
    """Logits (Q, h, w) of embeddings (Q, C) and pixel features (C, h, w)."""
    height, width = pixels.shape[1:]
    tokens = pixels.flatten(1).T
    if config.mask_repair and config.mask_grid == "pixels":
        mask = found_outliers(tokens, config)
        tokens = repaired(tokens, mask, height, width)
    logits = mask_embeddings @ tokens.T
    if config.mask_threshold:
        cosine = F.normalize(mask_embeddings, dim=-1) @ F.normalize(tokens, dim=-1).T
        logits = torch.where(cosine < config.similarity_beta, 0, logits)
    return logits.view(-1, height, width)
