"""The vision transformer of a CLIP, with the same names for every library.

`openclip_tower.py`, `timm_tower.py` and `transformers_tower.py` map each library's modules to these
names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stitch import Stitch

INTERPOLATION_OFFSET = 0.1  # as in SC-CLIP and DINO: rounding then never loses a row of patches


class Tower(ABC):
    """The parts of a model that SC-CLIP and its baselines use.

    A tower is made anew for every call, so that it has the weights that the model has then.

    Raises:
        ValueError: the model lacks a part or has an unsupported one.

    Attributes:
        model: the whole model.
        visual: its vision tower.
        patch_embedding: the module that embeds the patches.
        prefix_tokens: (P, D), the tokens before those of the patches: the class token, registers.
            Some models have none, P = 0.
        has_class_token: whether the first of them is a class token.
        positional_embedding: (P + h w, D), or (h w, D) if only patches have one; None for a model
            without.
        grid_size: (h, w) of the images that the model was trained on.
        norm_before: the norm before the first block.
        blocks: the transformer's blocks, for `qkv`, `out_proj`, `add_residual_and_mlp` and
            `run_block`.
        stitch: for the last block, if the images of a batch are the windows of one image, whose
            patches this block then has; else None.
    """

    model: nn.Module
    visual: nn.Module
    patch_embedding: nn.Module
    prefix_tokens: Tensor
    has_class_token: bool = True
    positional_embedding: Tensor | None
    grid_size: tuple[int, int]
    norm_before: nn.Module
    blocks: Sequence[nn.Module]
    stitch: Stitch | None = None

    @abstractmethod
    def __init__(self, model: nn.Module) -> None: ...

    @abstractmethod
    def qkv(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (..., heads, N, d) of tokens (..., N, D), after the norm.

        The last h w tokens are the patches of the grid that `at` or `embed` was called with; a
        model with rotary embeddings rotates these queries and keys. With `stitch`, the tokens are
        those of windows, and the result has the patches of the whole image, (1, ..., heads, N, d).
        """

    @abstractmethod
    def out_proj(self, block: nn.Module, heads: Tensor) -> Tensor:
        """The output projection of a block's attention for concatenated heads, (..., N, D).

        Norms between the heads and the residual connection belong to it; layer scale does not.
        """

    @abstractmethod
    def add_residual_and_mlp(self, block: nn.Module, tokens: Tensor, attended: Tensor) -> Tensor:
        """The rest of a block after `merge_heads`: both residuals and the MLP, all (B, N, D)."""

    @abstractmethod
    def norm_and_project(self, tokens: Tensor) -> Tensor:
        """The norm after the last block and the projection to the text, (..., D) to (..., E)."""

    @abstractmethod
    def tokenize(self, tokenizer: Callable, texts: list[str]) -> dict[str, Tensor]:
        """Token ids of texts for `encode_text`; "input_ids" are (B, length), padded on the right.

        Raises:
            TypeError: the tokenizer is of another library than the model.
            ValueError: the model has no text encoder, a text is longer than its context, or the
                tokenizer's vocabulary is not the model's.
        """

    @abstractmethod
    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        """Unit vectors (B, E) of texts, given the result of `tokenize`."""

    @property
    def patch_size(self) -> int:
        return self.patch_embedding.stride[0]

    @property
    def device(self) -> torch.device:
        return next(self.patch_embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.patch_embedding.parameters()).dtype

    def at(self, grid: tuple[int, int]) -> Tower:
        """Returns this tower, set to images of a grid (h, w): `qkv` may depend on it."""
        return self

    def embed_patches(self, images: Tensor) -> Tensor:
        """Embeddings (B, D, h, w) of the patches of images (B, 3, H, W)."""
        return self.patch_embedding(images)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, P + N, D) of images (B, 3, H, W), prefix tokens first, and their grid."""
        patches = self.embed_patches(images)
        grid = (patches.shape[2], patches.shape[3])
        self.at(grid)
        tokens = patches.flatten(2).mT
        prefix = self.prefix_tokens.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([prefix, tokens], dim=1)
        if self.positional_embedding is not None:
            positions = self.positions(grid).to(tokens.dtype)
            without = tokens.shape[1] - positions.shape[0]
            tokens = tokens + (F.pad(positions, (0, 0, without, 0)) if without else positions)
        return self.norm_before(tokens), grid

    def class_token(self, tokens: Tensor) -> Tensor:
        """The class token (B, 1, D) of tokens (B, P + N, D); zeros if the model has none."""
        return tokens[:, :1] if self.has_class_token else torch.zeros_like(tokens[:, :1])

    def patches(self, tokens: Tensor) -> Tensor:
        """The patches (B, N, D) of tokens (B, P + N, D)."""
        return tokens[:, self.prefix_tokens.shape[0] :]

    def block_outputs(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """Outputs of all blocks but the last for images (B, 3, H, W), and the grid; see `embed`."""
        tokens, grid = self.embed(images)
        outputs = []
        for block in self.blocks[:-1]:
            tokens = self.run_block(block, tokens)
            outputs.append(tokens)
        return outputs, grid

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positional embedding, stretched from `grid_size` to a grid (h, w) as SC-CLIP does.

        The resizing is bicubic, without antialiasing, by the scale (h + 0.1) / (the model's h).
        open_clip's own resizing, which happens when a model is made, is antialiased and differs
        visibly; transformers' leaves out the 0.1. Rows of prefix tokens stay as they are.
        """
        embedding, trained = self.positional_embedding, self.grid_size
        assert embedding is not None
        if grid == trained:
            return embedding
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        first = embedding.shape[0] - trained[0] * trained[1]
        patches = embedding[first:].to(dtype).unflatten(0, trained).permute(2, 0, 1)
        scale = [(new + INTERPOLATION_OFFSET) / old for new, old in zip(grid, trained, strict=True)]
        stretched = F.interpolate(patches[None], scale_factor=scale, mode="bicubic")[0]
        stretched = stretched.permute(1, 2, 0).flatten(0, 1).to(embedding.dtype)
        return torch.cat([embedding[:first], stretched])

    def run_block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Output of a whole block for tokens (B, N, D).

        The libraries' own calls compute the same function, but torch's MultiheadAttention
        (open_clip) and eager attention (transformers) build the N x N matrices of all heads.
        """
        attended = F.scaled_dot_product_attention(*self.qkv(block, tokens))
        return self.add_residual_and_mlp(
            block, self.whole(tokens), self.merge_heads(block, attended)
        )

    def whole(self, tokens: Tensor) -> Tensor:
        """Patches (1, ..., N, D) of the image if `stitch` is set, else the tokens as they are."""
        return tokens if self.stitch is None else self.stitch(tokens)

    def whole_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid of the image if `stitch` is set, else the grid (h, w) as it is."""
        return grid if self.stitch is None else self.stitch.grid

    def merge_heads(self, block: nn.Module, attended: Tensor) -> Tensor:
        """Concatenates heads (..., heads, N, d) and applies the output projection, (..., N, D)."""
        return self.out_proj(block, attended.transpose(-3, -2).flatten(-2))

    def unit_features(self, tokens: Tensor) -> Tensor:
        """Unit vectors (..., E) in the space of the text, for tokens (..., D) of the last block."""
        return F.normalize(self.norm_and_project(tokens), dim=-1)


def is_of(library: str, instance: object) -> bool:
    """Returns whether a library defines the class of an object or one of its base classes."""
    return any(kind.__module__.partition(".")[0] == library for kind in type(instance).__mro__)


def check_fits(texts: list[str], too_long: Iterable[bool], length: int) -> None:
    """ValueError that names the first text that is too long for a context of `length` tokens."""
    for text, long in zip(texts, too_long, strict=True):
        if long:
            start = text if len(text) <= 80 else f"{text[:79]}…"
            raise ValueError(f"{start!r} is longer than the {length} tokens of the model's context")
