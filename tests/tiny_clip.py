"""Small open_clip models with random weights, and images with regions, for the tests of models."""

from __future__ import annotations

import functools

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, convert_weights_to_lp
from torch import Tensor

SIDE, PATCH = 32, 4  # 8 x 8 patches, more than the 30 neighbours of LOF

VISION = dict(layers=12, width=32, head_width=8, patch_size=PATCH, image_size=SIDE)
TEXT = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)


def tiny_clip(*, quick_gelu: bool = False, dtype: torch.dtype | None = None, **vision) -> CLIP:
    """A frozen CLIP of `VISION`, changed by `vision`, with the same weights on every call.

    dtype: float16 or bfloat16, for the weights to which open_clip's precision of that name applies.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP(24, VISION | vision, TEXT, quick_gelu=quick_gelu, cast_dtype=dtype)
        randomise(model)
    if dtype is not None:
        convert_weights_to_lp(model, dtype)
    return model.eval().requires_grad_(False)


def randomise(model: torch.nn.Module) -> None:
    """Change biases and norms, whose initial 0 and 1 would hide whether they are used."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter += 0.2 * torch.randn_like(parameter)


def images(batch: int, height: int, width: int, regions: int = 4) -> Tensor:
    """Images (batch, 3, height, width), float32, about normalised: smooth regions with noise."""
    coarse = torch.randn(batch, 3, regions, regions)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")
    return smooth + 0.1 * torch.randn(batch, 3, height, width)


@functools.cache
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=TEXT["context_length"])


def photo(height, width):
    """A photo (height, width, 3), uint8: regions of one colour each, and noise."""
    coarse = torch.rand(1, 3, 4, 5)
    smooth = F.interpolate(coarse, (height, width), mode="nearest")[0]
    noisy = (255 * smooth + 20 * torch.randn_like(smooth)).clamp(0, 255)
    return noisy.permute(1, 2, 0).byte()
