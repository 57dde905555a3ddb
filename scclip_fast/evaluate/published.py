"""The published pipeline's pixels: mmsegmentation's resizing, and SC-CLIP's image for PAMR.

mmsegmentation resizes a photo in uint8 with OpenCV, which rounds weights to 1/2048 and colours to
whole numbers. This rounding decides the label of a pixel where two classes are nearly as probable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..segment import Segmenter
from ..segment.image import input_size

_ONE = 2048  # a weight of 1: OpenCV stores weights as whole multiples of 2^-11


class PublishedSegmenter(Segmenter):
    """A Segmenter whose labels are those of the published evaluation.

    It takes the arguments of `Segmenter` and differs from it in two ways, both of which lose a
    little detail. `resize_uint8` resizes the photo in uint8. PAMR follows the edges of the resized
    photo, scaled back to the size of the original, where `Segmenter` uses the original photo.
    """

    def _resized(self, image: Tensor) -> Tensor:
        size = input_size((image.shape[1], image.shape[2]), self.short_side)
        return self._normalised(resize_uint8(image.to(self.mean.device), size))

    def _guide(self, image: Tensor, pixels: Tensor) -> Tensor:
        return F.interpolate(pixels, image.shape[1:], mode="bilinear")


def resize_uint8(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes as `cv2.resize` does with INTER_LINEAR, bit for bit.

    The rules are those of `resize.cpp` in OpenCV 3.4 and 4: the width is resized first, then the
    height, in whole numbers that are truncated in between. There is no antialiasing.

    Args:
        pixels: (..., H, W), uint8.
        size: (h, w), each at least 1.

    Returns:
        (..., h, w), uint8.

    Raises:
        TypeError: the pixels are not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels must be uint8, got {pixels.dtype}")
    left, right, weight = _neighbours(pixels.shape[-1], size[1], pixels.device)
    first, second = pixels[..., left].int(), pixels[..., right].int()
    columns = (first * (_ONE - weight) + second * weight) >> 4  # of 2^11, 7 bits are left
    above, below, weight = _neighbours(pixels.shape[-2], size[0], pixels.device)
    # Each product is truncated on its own, also at the border, where both rows are the same.
    first = (columns[..., above, :] * (_ONE - weight)[:, None]) >> 16
    second = (columns[..., below, :] * weight[:, None]) >> 16
    return ((first + second + 2) >> 2).to(torch.uint8)


def _neighbours(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the two of `source` pixels between which each of `target` pixels lies.

    The third result is the weight of the second pixel, in units of 1/2048.
    """
    # OpenCV rounds the positions to float32 before it computes the weights.
    position = (torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    position = position.float()
    first = position.floor()
    weight = (_ONE * (position - first)).round().int()
    pixels = ((first + step).clamp(0, source - 1).long().to(device) for step in (0, 1))
    return *pixels, weight.to(device)
