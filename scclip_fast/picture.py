"""Pictures as tensors: what a user may give, the size it is seen in, windows, and the way back."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .extras import needs

with needs("clip"):
    import numpy as np
    from PIL import Image

LONG_SIDE = 2048  # pixels; where the short side would make the other longer, this one decides
_BAND_BYTES = 64 * 2**20  # of maps at the picture's own size that are held at a time

Picture = Image.Image | np.ndarray | Tensor


def to_tensor(image: Picture) -> Tensor:
    """(3, H, W), uint8, of a PIL image or a uint8 array or tensor (H, W, 3)."""
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        found = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be a PIL image or a uint8 array (H, W, 3), got {found}")
    if image.dim() != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image must be (H, W, 3), got {tuple(image.shape)}")
    return image.permute(2, 0, 1)


def seen_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """mmseg's Resize(scale=(2048, short_side), keep_ratio=True)."""
    if short_side is None:
        return size
    scale = min(short_side / min(size), max(LONG_SIDE, short_side) / max(size))
    height, width = (max(int(side * scale + 0.5), 1) for side in size)
    return height, width


def windows(size: tuple[int, int], crop: int, stride: int) -> list[tuple[slice, slice]]:
    """Rows and columns of windows of crop x crop pixels, or less where the picture has less.

    They start every `stride` pixels; the last of a row or column is flush with the border.
    """
    starts = [
        [min(step * stride, last) for step in range(math.ceil(last / stride) + 1)]
        for last in (max(side - crop, 0) for side in size)
    ]
    return [(slice(y, y + crop), slice(x, x + crop)) for y in starts[0] for x in starts[1]]


def upsampled(maps: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Bilinear upsampling of maps (C, h, w) to a size (H, W), in bands (C, rows, W)."""
    (height, width), source = size, maps.shape[1]
    band = max(1, _BAND_BYTES // (4 * len(maps) * width))
    center = (torch.arange(height, device=maps.device) + 0.5) * (source / height) - 0.5
    center = center.clamp(0, source - 1)
    above = center.floor().long()
    below = (above + 1).clamp(max=source - 1)
    for top in range(0, height, band):
        rows = slice(top, top + band)
        share = (center[rows] - above[rows]).to(maps.dtype)[:, None]
        mixed = torch.lerp(maps[:, above[rows]], maps[:, below[rows]], share)
        yield F.interpolate(mixed[None], (mixed.shape[1], width), mode="bilinear")[0]
