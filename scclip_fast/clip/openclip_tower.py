"""open_clip's VisionTransformer as a `Tower`."""

from __future__ import annotations

import torch.nn.functional as F
from open_clip.transformer import AttentionalPooler, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from .openclip_text import OpenClipText


class OpenClipTower(OpenClipText):
    """The `Tower` of an open_clip model with open_clip's own VisionTransformer; see there."""

    def __init__(self, model: nn.Module) -> None:
        _check(model.visual)
        self.model, self.visual = model, model.visual
        self.patch_embedding = self.visual.conv1
        self.prefix_tokens = self.visual.class_embedding[None]
        self.positional_embedding = self.visual.positional_embedding
        self.grid_size = tuple(self.visual.grid_size)
        self.norm_before = self.visual.ln_pre
        self.blocks = self.visual.transformer.resblocks

    def qkv(self, block: ResidualAttentionBlock, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = block.attn
        projected = F.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
        split = self.whole(projected).unflatten(-1, (3, attention.num_heads, attention.head_dim))
        return split.transpose(-4, -2).unbind(-3)  # (..., heads, 3, N, d)

    def out_proj(self, block: ResidualAttentionBlock, heads: Tensor) -> Tensor:
        return block.attn.out_proj(heads)

    def add_residual_and_mlp(
        self, block: ResidualAttentionBlock, tokens: Tensor, attended: Tensor
    ) -> Tensor:
        tokens = tokens + block.ls_1(attended)
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))

    def norm_and_project(self, tokens: Tensor) -> Tensor:
        """See `Tower`. CoCa pools by attention before the norm: there, each token by itself."""
        if self.visual.attn_pool is not None:
            tokens = pooled_alone(self.visual.attn_pool, tokens)
        return self.visual.ln_post(tokens) @ self.visual.proj


def pooled_alone(pool: AttentionalPooler, tokens: Tensor) -> Tensor:
    """CoCa's attention pooling of each token (..., D) as if the image had no other, (..., E).

    The softmax over one key is 1 for every query, so that the projection of the value remains.
    """
    attention, width = pool.attn, pool.attn.embed_dim
    weight = attention.v_proj_weight  # None where queries and tokens have the same width
    weight = attention.in_proj_weight[2 * width :] if weight is None else weight
    values = F.linear(pool.ln_k(tokens), weight, attention.in_proj_bias[2 * width :])
    return attention.out_proj(values)


def _check(visual: nn.Module) -> None:
    """ValueError unless a vision tower is one that SC-CLIP can calibrate."""
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"the vision tower is open_clip's {type(visual).__name__}, which is convolutional: it "
            "has no blocks of attention"
        )
    if getattr(visual, "attn_pool_contrastive", None) is not None:
        raise ValueError(
            "the vision tower has a second attention pooling, which normalises its tokens before "
            "they are pooled: this layout is not supported"
        )
    for block in visual.transformer.resblocks:
        if type(block) is not ResidualAttentionBlock:
            raise ValueError(
                f"blocks must be open_clip's ResidualAttentionBlock, got {type(block).__name__}: "
                "normalised or scaled attention is not supported"
            )
