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

    def _resized(self, pixels: Tensor) -> Tensor:
        size = (pixels.shape[2], pixels.shape[3])
        return resize_uint8(pixels, seen_size(size, self.short_side)).float()

    def _guide(self, pixels: Tensor, seen: Tensor) -> Tensor:
        return F.interpolate(seen, pixels.shape[2:], mode="bilinear")


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
    left, (near, far) = _weights(pixels.shape[-1], size[1], pixels.device)
    last = pixels.shape[-1] - 1
    # Beyond the first and the last column there is one neighbour, with the whole weight.
    inside = (left >= 0) & (left < last)
    near, far = torch.where(inside, near, _ONE), torch.where(inside, far, 0)
    first, second = (pixels[..., x.clamp(0, last)].int() for x in (left, left + 1))
    columns = (first * near + second * far) >> 4

    above, (near, far) = _weights(pixels.shape[-2], size[0], pixels.device)
    last = pixels.shape[-2] - 1
    # Here both neighbours are the row at the border, and each share is truncated on its own.
    first, second = (columns[..., y.clamp(0, last), :] for y in (above, above + 1))
    shares = (first * near[:, None] >> 16) + (second * far[:, None] >> 16)
    return ((shares + 2) >> 2).to(torch.uint8)


def _weights(
    source: int, target: int, device: torch.device
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The first of two neighbours, -1 to source - 1, and the weights of both, each (target,)."""
    scale = 1 / (target / source)  # with OpenCV's two roundings
    # OpenCV rounds the float64 position to float32 before the division into neighbour and weight.
    position = ((torch.arange(target, dtype=torch.float64) + 0.5) * scale - 0.5).float()
    first = position.floor()
    share = position - first
    near, far = ((_ONE * weight).round().int().to(device) for weight in (1 - share, share))
    return first.long().to(device), (near, far)
