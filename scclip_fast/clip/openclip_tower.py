"""open_clip's VisionTransformer as a `Tower`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from .tower import Tower, check_fits, is_of


class OpenClipTower(Tower):
    """The `Tower` of an open_clip model; see there."""

    def __init__(self, model: nn.Module) -> None:
        _check(model.visual)
        self.model, self.visual = model, model.visual
        self.patch_embedding = self.visual.conv1
        self.class_embedding = self.visual.class_embedding
        self.positional_embedding = self.visual.positional_embedding
        self.grid_size = tuple(self.visual.grid_size)
        self.norm_before = self.visual.ln_pre
        self.blocks = self.visual.transformer.resblocks

    def qkv(self, block: ResidualAttentionBlock, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = block.attn
        projected = F.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
        split = projected.unflatten(-1, (3, attention.num_heads, attention.head_dim))
        return split.transpose(-4, -2).unbind(-3)  # (..., heads, 3, N, d)

    def out_proj(self, block: ResidualAttentionBlock) -> nn.Linear:
        return block.attn.out_proj

    def add_residual_and_mlp(
        self, block: ResidualAttentionBlock, tokens: Tensor, attended: Tensor
    ) -> Tensor:
        tokens = tokens + block.ls_1(attended)
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))

    def norm_and_project(self, tokens: Tensor) -> Tensor:
        return self.visual.ln_post(tokens) @ self.visual.proj

    def tokenize(self, tokenizer: Callable, texts: list[str]) -> dict[str, Tensor]:
        if is_of("transformers", tokenizer):
            name = type(tokenizer).__name__
            raise TypeError(f"tokenizer must be open_clip's, as the model is; got a {name}")
        length = self._context_length(tokenizer)
        ids, longer = (tokenizer(texts, context_length=length + extra) for extra in (0, 1))
        # A tokenizer cuts a long text without an error and puts the end token where, with one
        # token more, a word stands.
        check_fits(texts, (longer[:, :length] != ids).any(dim=1).tolist(), length)
        vocabulary = self.model.vocab_size
        if vocabulary and ids.max() >= vocabulary:  # open_clip has no size for some text models
            raise ValueError(
                f"tokenizer has a token {ids.max()} where the model's vocabulary has {vocabulary}: "
                "it belongs to another model"
            )
        return {"input_ids": ids}

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.model.encode_text(tokens["input_ids"].to(self.device), normalize=True)

    def _context_length(self, tokenizer: Callable) -> int:
        """The model's context length, or the tokenizer's if the text model takes any length.

        The latter are transformers' text models in open_clip.
        """
        text = getattr(self.model, "text", self.model)
        fixed = hasattr(text, "positional_embedding")
        return self.model.context_length if fixed else tokenizer.context_length


def _check(visual: nn.Module) -> None:
    """ValueError unless a vision tower is one that SC-CLIP can calibrate."""
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
