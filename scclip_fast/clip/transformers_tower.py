"""The vision transformer of transformers' CLIP as a `Tower`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from .tower import Tower, check_fits, is_of

_KINDS = (CLIPModel, CLIPVisionModelWithProjection, CLIPVisionModel)


class TransformersTower(Tower):
    """The `Tower` of a CLIP of transformers; see there."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, _KINDS):
            names = ", ".join(kind.__name__ for kind in _KINDS)
            raise ValueError(
                f"model must be one of transformers' {names}, got {type(model).__name__}; of a "
                "wrapped model, pass the model inside"
            )
        self.model = model
        # A CLIPVisionModel is the transformer itself or, in older versions, contains it.
        self.visual = getattr(model, "vision_model", model)
        embeddings = self.visual.embeddings
        self.patch_embedding = embeddings.patch_embedding
        self.prefix_tokens = embeddings.class_embedding[None]
        self.positional_embedding = embeddings.position_embedding.weight
        side = embeddings.image_size // embeddings.patch_size
        self.grid_size = (side, side)
        self.norm_before = self.visual.pre_layrnorm
        self.blocks = self.visual.encoder.layers

    def qkv(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, tokens = block.self_attn, block.layer_norm1(tokens)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (
            self.whole(projection(tokens))
            .unflatten(-1, (attention.num_heads, -1))
            .transpose(-3, -2)
            for projection in projections
        )
        return q, k, v

    def out_proj(self, block: nn.Module, heads: Tensor) -> Tensor:
        return block.self_attn.out_proj(heads)

    def add_residual_and_mlp(self, block: nn.Module, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = tokens + attended
        return tokens + block.mlp(block.layer_norm2(tokens))

    def norm_and_project(self, tokens: Tensor) -> Tensor:
        tokens = self.visual.post_layernorm(tokens)
        if isinstance(self.model, CLIPVisionModel):
            return tokens
        return self.model.visual_projection(tokens)

    def tokenize(self, tokenizer: Callable, texts: list[str]) -> dict[str, Tensor]:
        if not isinstance(self.model, CLIPModel):
            name = type(self.model).__name__
            raise ValueError(f"text needs a CLIPModel, got a {name}, which has no text encoder")
        if not is_of("transformers", tokenizer):
            name = type(tokenizer).__name__
            raise TypeError(f"tokenizer must be transformers', as the model is; got a {name}")
        config = self.model.config.text_config
        length = config.max_position_embeddings
        # By keyword: the first argument of a CLIPProcessor is the images.
        tokens = tokenizer(text=texts, padding=True, truncation=False, return_tensors="pt")
        check_fits(texts, (tokens.attention_mask.sum(dim=1) > length).tolist(), length)
        if (highest := tokens.input_ids.max()) >= config.vocab_size:
            raise ValueError(
                f"tokenizer has a token {highest} where the model's vocabulary has "
                f"{config.vocab_size}: it belongs to another model"
            )
        return dict(tokens)

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        tokens = {name: each.to(self.device) for name, each in tokens.items()}
        # Not get_text_features: in some versions it returns a tensor, in others a structure.
        pooled = self.model.text_model(**tokens)[1]
        return F.normalize(self.model.text_projection(pooled), dim=-1)
