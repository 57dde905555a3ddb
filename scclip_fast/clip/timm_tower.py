"""The plain vision transformers of timm inside open_clip, as a `Tower`.

These are timm's VisionTransformer (SigLIP, SigLIP2, MobileCLIP-B) and Eva (EVA01, EVA02, PE-Core).
"""

from __future__ import annotations

import copy

import torch
from timm.layers import AttentionPoolLatent, RotaryEmbeddingCat, apply_rot_embed_cat
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .openclip_text import OpenClipText
from .tower import Tower

_BLOCKS = (Block, EvaBlock, EvaBlockPostNorm)


class TimmTower(OpenClipText):
    """The `Tower` of an open_clip model whose vision tower is a vision transformer of timm.

    Where a model pools its tokens by attention, a patch is pooled alone: its weight is 1, so that
    the projection of its value and the pool's MLP remain. Where a model has no class token, as
    SigLIP, methods add none.
    """

    def __init__(self, model: nn.Module) -> None:
        trunk = model.visual.trunk
        _check(trunk)
        self.model, self.visual, self.trunk = model, model.visual, trunk
        self.patch_embedding, self.norm_before = trunk.patch_embed, trunk.norm_pre
        self.blocks = trunk.blocks
        prefix = [token[0] for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        none = next(trunk.parameters()).new_empty(0, trunk.embed_dim)
        self.prefix_tokens = torch.cat(prefix or [none])
        self.has_class_token = trunk.cls_token is not None
        self.positional_embedding = None if trunk.pos_embed is None else trunk.pos_embed[0]
        self.grid_size = tuple(trunk.patch_embed.grid_size)
        self._rotation: Tensor | None = None  # of the patches of the grid that `at` was called with

    @property
    def patch_size(self) -> int:
        return self.trunk.patch_embed.feat_ratio(as_scalar=True)

    def at(self, grid: tuple[int, int]) -> Tower:
        rotary = getattr(self.trunk, "rope", None)
        if rotary is not None:
            if grid != self.grid_size:  # a model of fixed size holds the angles of its own grid
                rotary = copy.deepcopy(rotary)
                rotary.update_feat_shape(list(grid))
            self._rotation = rotary.get_embed()
        return self

    def embed_patches(self, images: Tensor) -> Tensor:
        # The layer's own call refuses images of another size than the model's.
        layer = self.patch_embedding
        backbone = getattr(layer, "backbone", None)  # the convolutions of MobileCLIP
        features = images if backbone is None else backbone(images)
        return layer.proj(features[-1] if isinstance(features, list | tuple) else features)

    def qkv(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = block.attn
        tokens = tokens if isinstance(block, EvaBlockPostNorm) else block.norm1(tokens)
        if attention.qkv is None:
            layers = (attention.q_proj, attention.k_proj, attention.v_proj)
            parts = [layer(tokens) for layer in layers]
        else:
            projected = attention.qkv(tokens)
            if getattr(attention, "q_bias", None) is not None:
                biases = (attention.q_bias, attention.k_bias, attention.v_bias)
                projected = projected + torch.cat(biases)
            parts = list(projected.chunk(3, dim=-1))
        heads = (part.unflatten(-1, (attention.num_heads, -1)) for part in parts)
        q, k, v = (head.transpose(-3, -2) for head in heads)
        q, k, v = map(self.whole, (attention.q_norm(q), attention.k_norm(k), v))
        return self._rotated(block, q), self._rotated(block, k), v

    def _rotated(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Queries or keys (..., N, d), rotated where they are those of patches."""
        if self._rotation is None:
            return tokens
        prefix, patches = tokens.tensor_split([tokens.shape[-2] - len(self._rotation)], dim=-2)
        half = getattr(block.attn, "rotate_half", False)
        rotated = apply_rot_embed_cat(patches, self._rotation, half=half)
        return torch.cat([prefix, rotated.to(tokens.dtype)], dim=-2)

    def out_proj(self, block: nn.Module, heads: Tensor) -> Tensor:
        norm = getattr(block.attn, "norm", None)
        projected = block.attn.proj(heads if norm is None else norm(heads))
        return block.norm1(projected) if isinstance(block, EvaBlockPostNorm) else projected

    def add_residual_and_mlp(self, block: nn.Module, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = tokens + _scaled(block, 1, attended)
        if isinstance(block, EvaBlockPostNorm):
            return tokens + block.norm2(block.mlp(tokens))
        return tokens + _scaled(block, 2, block.mlp(block.norm2(tokens)))

    def norm_and_project(self, tokens: Tensor) -> Tensor:
        tokens = self.trunk.norm(tokens)
        if self.trunk.attn_pool is not None:
            tokens = pooled_alone(self.trunk.attn_pool, tokens)
        return self.visual.head(self.trunk.head(self.trunk.fc_norm(tokens)))


def pooled_alone(pool: AttentionPoolLatent, tokens: Tensor) -> Tensor:
    """Attention pooling of each token (..., D) as if the image had no other, (..., D)."""
    _, values = pool.kv(tokens).chunk(2, dim=-1)
    pooled = pool.proj(values)
    return pooled if pool.mlp is None else pooled + pool.mlp(pool.norm(pooled))


def _scaled(block: nn.Module, which: int, branch: Tensor) -> Tensor:
    """A branch of a block times its layer scale, if it has one."""
    if isinstance(block, Block):
        return getattr(block, f"ls{which}")(branch)
    gamma = getattr(block, f"gamma_{which}", None)
    return branch if gamma is None else gamma * branch


def _check(trunk: nn.Module) -> None:
    """ValueError unless a trunk is a plain vision transformer whose parts this module knows."""
    if type(trunk) not in (VisionTransformer, Eva):
        raise ValueError(
            f"the vision tower is timm's {type(trunk).__name__}: only its plain vision "
            "transformers, VisionTransformer and Eva, have tokens that every block attends to"
        )
    unknown = {type(block).__name__ for block in trunk.blocks if type(block) not in _BLOCKS}
    if unknown:
        raise ValueError(f"the vision tower has blocks of timm's {unknown.pop()}: not supported")
    attention = [block.attn for block in trunk.blocks]
    odd = {
        "gated attention": any(getattr(a, "gate", None) is not None for a in attention),
        "grouped queries": any(getattr(a, "num_kv_groups", 1) > 1 for a in attention),
        "a norm of the patches": not isinstance(
            getattr(trunk.patch_embed, "norm", nn.Identity()), nn.Identity
        ),
        "other rotary embeddings": getattr(trunk, "rope", None) is not None
        and type(trunk.rope) is not RotaryEmbeddingCat,
        "a pool with positions": getattr(trunk.attn_pool, "pos_embed", None) is not None,
    }
    if found := [name for name, present in odd.items() if present]:
        raise ValueError(f"the vision tower has {found[0]}: not supported")
