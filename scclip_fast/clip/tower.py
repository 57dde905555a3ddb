"""What SC-CLIP needs of open_clip's vision transformer: embeddings, blocks, heads, projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

INTERPOLATION_OFFSET = 0.1  # SC-CLIP's and DINO's, so that rounding never loses a row of patches


def check(model: nn.Module) -> None:
    """ValueError unless the vision tower of `model` has patch tokens in the space of the text."""
    visual = getattr(model, "visual", None)
    if not isinstance(visual, VisionTransformer):
        trunk = getattr(visual, "trunk", visual)
        kind = f"timm's {type(trunk).__name__}" if trunk is not visual else type(visual).__name__
        raise ValueError(
            f"the vision tower must be open_clip's VisionTransformer, got {kind}: "
            "ResNet towers have no last block of attention, timm towers are untested"
        )
    if visual.attn_pool is not None:
        raise ValueError(
            "the vision tower pools by attention (CoCa): its patch tokens have no projection to "
            "the text; use a model with a class token"
        )
    for block in visual.transformer.resblocks:
        if type(block) is not ResidualAttentionBlock:
            raise ValueError(
                f"blocks must be open_clip's ResidualAttentionBlock, got {type(block).__name__}: "
                "normalised or scaled attention is not supported"
            )


def embed(visual: VisionTransformer, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Images (B, 3, H, W) to tokens (B, 1 + N, D), the class token first, and their grid (h, w)."""
    patches = visual.conv1(images)
    grid = (patches.shape[2], patches.shape[3])
    tokens = patches.flatten(2).mT
    class_token = visual.class_embedding.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
    tokens = torch.cat([class_token, tokens], dim=1)
    return visual.ln_pre(tokens + positions(visual, grid).to(tokens.dtype)), grid


def layers(visual: VisionTransformer, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
    """What every block but the last makes of images (B, 3, H, W), and the grid; see `embed`."""
    tokens, grid = embed(visual, images)
    outputs = []
    for layer in visual.transformer.resblocks[:-1]:
        tokens = block(layer, tokens)
        outputs.append(tokens)
    return outputs, grid


def positions(visual: VisionTransformer, grid: tuple[int, int]) -> Tensor:
    """Positional embedding (1 + h w, D), stretched to the grid as SC-CLIP does.

    Bicubic, without antialiasing, by the scale (h + 0.1) / (that of the model). open_clip's own
    resizing, which happens when a model is made, is antialiased and differs visibly.
    """
    embedding = visual.positional_embedding
    if grid == tuple(visual.grid_size):
        return embedding
    dtype = torch.promote_types(embedding.dtype, torch.float32)
    patches = embedding[1:].to(dtype).unflatten(0, visual.grid_size).permute(2, 0, 1)
    scale = [
        (new + INTERPOLATION_OFFSET) / old for new, old in zip(grid, visual.grid_size, strict=True)
    ]
    stretched = F.interpolate(patches[None], scale_factor=scale, mode="bicubic")[0]
    return torch.cat([embedding[:1], stretched.permute(1, 2, 0).flatten(0, 1).to(embedding.dtype)])


def block(layer: ResidualAttentionBlock, tokens: Tensor) -> Tensor:
    """A whole block on (B, N, D).

    open_clip's own call is the same function, but torch's MultiheadAttention builds the N x N
    matrices of all heads on a CPU.
    """
    q, k, v = heads(layer, tokens)
    return finish(layer, tokens, merge(layer, F.scaled_dot_product_attention(q, k, v)))


def finish(layer: ResidualAttentionBlock, tokens: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block after its attention: both residuals and the MLP; all (B, N, D)."""
    tokens = tokens + layer.ls_1(attended)
    return tokens + layer.ls_2(layer.mlp(layer.ln_2(tokens)))


def heads(layer: ResidualAttentionBlock, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (..., heads, N, d) of the normalised tokens (..., N, D)."""
    attention = layer.attn
    projected = F.linear(layer.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
    split = projected.unflatten(-1, (3, attention.num_heads, attention.head_dim))
    return split.transpose(-4, -2).unbind(-3)  # (..., heads, 3, N, d)


def merge(layer: ResidualAttentionBlock, attended: Tensor) -> Tensor:
    """Heads (..., heads, N, d) through the output projection, (..., N, D)."""
    return layer.attn.out_proj(attended.transpose(-3, -2).flatten(-2))


def project(visual: VisionTransformer, tokens: Tensor) -> Tensor:
    """Tokens (B, N, D) to unit vectors (B, N, E) in the space of the text."""
    return F.normalize(visual.ln_post(tokens) @ visual.proj, dim=-1)
