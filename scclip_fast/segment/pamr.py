"""Pixel-adaptive mask refinement (PAMR)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DILATIONS = (8, 16)  # pixels, as in SC-CLIP
_CONTRAST = 0.1  # the scale of a difference, as a share of the local standard deviation
_EPS = 1e-8


def pamr(image: Tensor, maps: Tensor, steps: int, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Smooths maps along the edges of an image (PAMR; Araslanov and Roth, CVPR 2020).

    Each step replaces a pixel i of the maps by a weighted mean of its neighbours j, 8 at each
    dilation. The weights are the softmax over j of -|x_i - x_j| / (0.1 sigma_i), averaged over the
    channels of the image x, where sigma_i is the standard deviation of a channel over the
    neighbours and the pixel itself. Beyond the border, the pixels of the border are repeated.

    Args:
        image: (B, K, H, W), floating. The scale of its channels does not matter. SC-CLIP's
            evaluation passes the resized photo, scaled back to the size of the original.
        maps: (B, C, H, W), floating.
        steps: number of steps, at least 0.
        dilations: distances of the neighbours, in pixels.

    Returns:
        (B, C, H, W).

    Raises:
        TypeError: image or maps are not floating.
        ValueError: the sizes do not fit, steps is below 0, or there is no dilation or one below 1.
    """
    if not (image.is_floating_point() and maps.is_floating_point()):
        raise TypeError(f"image and maps must be floating, got {image.dtype} and {maps.dtype}")
    if image.dim() != 4 or maps.dim() != 4:
        raise ValueError(
            f"image and maps must be (B, K, H, W) and (B, C, H, W), "
            f"got {tuple(image.shape)} and {tuple(maps.shape)}"
        )
    if image.shape[0] != maps.shape[0] or image.shape[2:] != maps.shape[2:]:
        raise ValueError(
            f"maps must have the batch and size of image {tuple(image.shape)}, "
            f"got {tuple(maps.shape)}"
        )
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations must be at least 1, got {tuple(dilations)}")
    weights = _affinities(image, dilations).to(maps.dtype)
    for _ in range(steps):
        neighbors = zip(weights.split(1, dim=1), _neighbors(maps, dilations), strict=True)
        maps = sum(weight * neighbor for weight, neighbor in neighbors)
    return maps


def _affinities(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """Returns the weights (B, P, H, W) of a pixel's P = 8 len(dilations) neighbours."""
    # The pixel itself counts once for each dilation, as in the published code.
    around = [*_neighbors(image, dilations), *[image] * len(dilations)]
    deviation = torch.stack(around).std(dim=0)
    contrast = [
        -((neighbor - image).abs() / (_EPS + _CONTRAST * deviation)).mean(dim=1)
        for neighbor in _neighbors(image, dilations)
    ]
    return torch.stack(contrast, dim=1).softmax(dim=1)


def _neighbors(x: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Yields x (B, C, H, W), shifted by each dilation in each of 8 directions."""
    height, width = x.shape[2:]
    for d in dilations:
        padded = F.pad(x, [d] * 4, mode="replicate")
        for row in (0, d, 2 * d):
            for column in (0, d, 2 * d):
                if (row, column) != (d, d):
                    yield padded[:, :, row : row + height, column : column + width]
