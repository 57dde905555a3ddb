"""What SC-CLIP needs of a CLIP's vision transformer: embedding, blocks, heads, projection.

Where a library keeps them is said in `openclip_tower.py` and `transformers_tower.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INTERPOLATION_OFFSET = 0.1  # SC-CLIP's and DINO's, so that rounding never loses a row of patches


class Tower(ABC):
    """A model's parts under names of ours, by what its library's subclass finds in it.

    It is made anew for every call, so that weights are those that the model has at that time.

    Raises:
        ValueError: a model without what is needed.

    Attributes:
        model: the whole model.
        visual: its vision transformer.
        patch_embedding: a convolution.
        class_embedding: (D,).
        positional_embedding: (1 + h w, D), the class token's first.
        grid_size: (h, w) of the images that the model was trained on.
        norm_before: the norm before the first block.
        blocks: what `heads`, `output` and `finish` take apart.
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
    def heads(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (..., heads, N, d) of the normalised tokens (..., N, D)."""

    @abstractmethod
    def output(self, block: nn.Module) -> nn.Linear:
        """The projection after a block's attention."""

    @abstractmethod
    def finish(self, block: nn.Module, tokens: Tensor, attended: Tensor) -> Tensor:
        """The rest of a block after its attention: both residuals and the MLP; all (B, N, D)."""

    @abstractmethod
    def final(self, tokens: Tensor) -> Tensor:
        """The last norm and the projection, (..., D) to (..., E)."""

    @abstractmethod
    def tokenize(self, tokenizer: Callable, texts: list[str]) -> dict[str, Tensor]:
        """Tokens of texts for `encode_text`; "input_ids" are (B, length), padded on the right.

        Raises:
            TypeError: a tokenizer of another library.
            ValueError: a model without a text encoder, a text that is longer than its context, or
                a tokenizer whose vocabulary is not the model's.
        """

    @abstractmethod
    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        """Unit vectors (B, E) of texts that `tokenize` took apart."""

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
        """Images (B, 3, H, W) to tokens (B, 1 + N, D), the class token first, and their (h, w)."""
        patches = self.patch_embedding(images)
        grid = (patches.shape[2], patches.shape[3])
        tokens = patches.flatten(2).mT
        class_token = self.class_embedding.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        tokens = torch.cat([class_token, tokens], dim=1)
        return self.norm_before(tokens + self.positions(grid).to(tokens.dtype)), grid

    def layers(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """What every block but the last makes of images (B, 3, H, W), and the grid; see `embed`."""
        tokens, grid = self.embed(images)
        outputs = []
        for block in self.blocks[:-1]:
            tokens = self.block(block, tokens)
            outputs.append(tokens)
        return outputs, grid

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positional embedding (1 + h w, D), stretched to the grid as SC-CLIP does.

        Bicubic, without antialiasing, by the scale (h + 0.1) / (that of the model). open_clip's own
        resizing, which happens when a model is made, is antialiased and differs visibly;
        transformers' leaves the 0.1 out.
        """
        embedding, own = self.positional_embedding, self.grid_size
        if grid == own:
            return embedding
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        patches = embedding[1:].to(dtype).unflatten(0, own).permute(2, 0, 1)
        scale = [(new + INTERPOLATION_OFFSET) / old for new, old in zip(grid, own, strict=True)]
        stretched = F.interpolate(patches[None], scale_factor=scale, mode="bicubic")[0]
        stretched = stretched.permute(1, 2, 0).flatten(0, 1).to(embedding.dtype)
        return torch.cat([embedding[:1], stretched])

    def block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """A whole block on (B, N, D).

        The libraries' own calls are the same function, but torch's MultiheadAttention (open_clip)
        and eager attention (transformers) build the N x N matrices of all heads.
        """
        attended = F.scaled_dot_product_attention(*self.heads(block, tokens))
        return self.finish(block, tokens, self.merge(block, attended))

    def merge(self, block: nn.Module, attended: Tensor) -> Tensor:
        """Heads (..., heads, N, d) through the output projection, (..., N, D)."""
        return self.output(block)(attended.transpose(-3, -2).flatten(-2))

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D) to unit vectors (..., E) in the space of the text."""
        return F.normalize(self.final(tokens), dim=-1)


def is_of(library: str, thing: object) -> bool:
    """Whether the class of a thing, or one that it inherits from, is a library's."""
    return any(kind.__module__.partition(".")[0] == library for kind in type(thing).__mro__)


def check_fits(texts: list[str], too_long: Iterable[bool], length: int) -> None:
    """ValueError that names the first of texts that are too long for a context of some length."""
    for text, long in zip(texts, too_long, strict=True):
        if long:
            start = text if len(text) <= 80 else f"{text[:79]}…"
            raise ValueError(f"{start!r} is longer than the {length} tokens of the model's context")
