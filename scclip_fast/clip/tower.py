"""The vision transformer of a CLIP, with the same names for every library.

`openclip_tower.py` and `transformers_tower.py` map each library's modules to these names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INTERPOLATION_OFFSET = 0.1  # as in SC-CLIP and DINO: rounding then never loses a row of patches


class Tower(ABC):
    """The parts of a model that SC-CLIP and its baselines use.

    A tower is made anew for every call, so that it has the weights that the model has then.

    Raises:
        ValueError: the model lacks a part or has an unsupported one.

    Attributes:
        model: the whole model.
        visual: its vision transformer.
        patch_embedding: the convolution of the patches.
        class_embedding: (D,).
        positional_embedding: (1 + h w, D), the class token's first.
        grid_size: (h, w) of the images that the model was trained on.
        norm_before: the norm before the first block.
        blocks: the transformer's blocks, for `qkv`, `out_proj`, `add_residual_and_mlp` and
            `run_block`.
    """

    model: nn.Module
    visual: nn.Module
    patch_embedding: nn.Conv2d
    class_embedding: Tensor
    positional_embedding: Tensor
    grid_size: tuple[int, int]
    norm_before: nn.Module
    blocks: Sequence[nn.Module]

    @abstractmethod
    def __init__(self, model: nn.Module) -> None: ...

    @abstractmethod
    def qkv(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (..., heads, N, d) of tokens (..., N, D), after the norm."""

    @abstractmethod
    def out_proj(self, block: nn.Module) -> nn.Linear:
        """The output projection of a block's attention."""

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
        return self.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, 1 + N, D) of images (B, 3, H, W), class token first, and their grid (h, w)."""
        patches = self.patch_embedding(images)
        grid = (patches.shape[2], patches.shape[3])
        tokens = patches.flatten(2).mT
        class_token = self.class_embedding.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        tokens = torch.cat([class_token, tokens], dim=1)
        return self.norm_before(tokens + self.positions(grid).to(tokens.dtype)), grid

    def block_outputs(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """Outputs of all blocks but the last for images (B, 3, H, W), and the grid; see `embed`."""
        tokens, grid = self.embed(images)
        outputs = []
        for block in self.blocks[:-1]:
            tokens = self.run_block(block, tokens)
            outputs.append(tokens)
        return outputs, grid

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positional embedding (1 + h w, D), stretched to the grid as SC-CLIP does.

        The resizing is bicubic, without antialiasing, by the scale (h + 0.1) / (the model's h).
        open_clip's own resizing, which happens when a model is made, is antialiased and differs
        visibly; transformers' leaves out the 0.1.
        """
        embedding, trained = self.positional_embedding, self.grid_size
        if grid == trained:
            return embedding
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        patches = embedding[1:].to(dtype).unflatten(0, trained).permute(2, 0, 1)
        scale = [(new + INTERPOLATION_OFFSET) / old for new, old in zip(grid, trained, strict=True)]
        stretched = F.interpolate(patches[None], scale_factor=scale, mode="bicubic")[0]
        stretched = stretched.permute(1, 2, 0).flatten(0, 1).to(embedding.dtype)
        return torch.cat([embedding[:1], stretched])

    def run_block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Output of a whole block for tokens (B, N, D).

        The libraries' own calls compute the same function, but torch's MultiheadAttention
        (open_clip) and eager attention (transformers) build the N x N matrices of all heads.
        """
        attended = F.scaled_dot_product_attention(*self.qkv(block, tokens))
        return self.add_residual_and_mlp(block, tokens, self.merge_heads(block, attended))

    def merge_heads(self, block: nn.Module, attended: Tensor) -> Tensor:
        """Concatenates heads (..., heads, N, d) and applies the output projection, (..., N, D)."""
        return self.out_proj(block)(attended.transpose(-3, -2).flatten(-2))

    def unit_features(self, tokens: Tensor) -> Tensor:
        """Unit vectors (..., E) in the space of the text, for tokens (..., D) of the last block."""
        return F.normalize(self.norm_and_project(tokens), dim=-1)


def is_of(library: str, instance: object) -> bool:
    """Whether a library defines the class of an object or a class that it inherits from."""
    return any(kind.__module__.partition(".")[0] == library for kind in type(instance).__mro__)


def check_fits(texts: list[str], too_long: Iterable[bool], length: int) -> None:
    """ValueError that names the first text that is too long for a context of `length` tokens."""
    for text, long in zip(texts, too_long, strict=True):
        if long:
            start = text if len(text) <= 80 else f"{text[:79]}…"
            raise ValueError(f"{start!r} is longer than the {length} tokens of the model's context")
