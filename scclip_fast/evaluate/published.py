"""The pixels of the published pipeline: mmsegmentation's resize, and SC-CLIP's picture for PAMR.

mmsegmentation resizes a photo in uint8 with OpenCV, which rounds weights to 1/2048 and colours to
whole numbers. Where two classes are nearly as probable, that decides the label of a pixel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..picture import seen_size
from ..segment import Segmenter

_ONE = 2048  # OpenCV's weights are whole numbers of 11 bits


class PublishedSegmenter(Segmenter):
    """A Segmenter whose labels are those of the published evaluation.

    It differs from `Segmenter` in two things, which lose a little detail. The photo is resized in
    uint8, by the rules of `resize_uint8`. And PAMR follows the edges of the resized photo, scaled
    back to the size of the original; those of `Segmenter` are the edges of the original photo.
    The arguments are those of `Segmenter`.
    """

    def _resized(self, picture: Tensor) -> Tensor:
        size = seen_size((picture.shape[1], picture.shape[2]), self.short_side)
        return self._normalised(resize_uint8(picture.to(self.mean.device), size))

    def _guide(self, picture: Tensor, pixels: Tensor) -> Tensor:
        return F.interpolate(pixels, picture.shape[1:], mode="bilinear")


def resize_uint8(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes as `cv2.resize` does with INTER_LINEAR, bit for bit.

    The rules are those of `resize.cpp` in OpenCV 3.4 and 4: columns first, in whole numbers, with
    truncation between columns and rows. No antialiasing.

    Args:
        pixels: (..., H, W), uint8.
        size: (h, w), each at least 1.

    Returns:
        (..., h, w), uint8.

    Raises:
        TypeError: pixels that are not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels must be uint8, got {pixels.dtype}")
    left, right, share = _neighbours(pixels.shape[-1], size[1], pixels.device)
    first, second = pixels[..., left].int(), pixels[..., right].int()
    columns = (first * (_ONE - share) + second * share) >> 4  # of 2^7
    above, below, share = _neighbours(pixels.shape[-2], size[0], pixels.device)
    # Also at the border, where both are one row, each part is truncated on its own.
    first = (columns[..., above, :] * (_ONE - share)[:, None]) >> 16
    second = (columns[..., below, :] * share[:, None]) >> 16
    return ((first + second + 2) >> 2).to(torch.uint8)


def _neighbours(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels that each of `target` lies between, and the weight of the second one."""
    # OpenCV rounds positions to float32 before it takes the weights from them.
    position = (torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    position = position.float()
    first = position.floor()
    share = (_ONE * (position - first)).round().int()
    pixels = ((first + step).clamp(0, source - 1).long().to(device) for step in (0, 1))
    return *pixels, share.to(device)
