"""The protocol of both segmenters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .image import ImageLike, to_tensor


class ImageSegmenter(nn.Module):
    """A frozen model and class names. A subclass implements `_bands`.

    Attributes:
        classes: the name of each class, in the order of the labels.
    """

    classes: list[str]

    @torch.inference_mode()
    def forward(self, image: ImageLike) -> Tensor:
        """Returns the class of each pixel.

        Args:
            image: a PIL image of any mode, which `image.to_rgb` makes upright RGB; or RGB as a
                uint8 array or tensor (H, W, 3).

        Returns:
            (H, W), int64, on the CPU: indices into `classes`, of the upright image's size.

        Raises:
            TypeError: the argument is no image.
            ValueError: the image is not (H, W, 3), is empty or has values that are no grey (see
                `image.to_rgb`), or the model's results are not finite.
        """
        pixels, top = to_tensor(image), 0
        labels = torch.empty(pixels.shape[1:], dtype=torch.int64)
        for band in self._label_bands(pixels):
            labels[top : top + len(band)] = band
            top += len(band)
        return labels

    @torch.inference_mode()
    def probabilities(self, image: ImageLike) -> Tensor:
        """Returns the probability of each class, (classes, H, W), float32, on the CPU.

        The argument and the errors are those of `forward`.
        """
        return torch.cat([probabilities.cpu() for _, probabilities in self.bands(image)], dim=1)

    @torch.inference_mode()
    def bands(self, image: ImageLike) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields labels (rows, W) and probabilities (classes, rows, W) from top to bottom.

        The bands bound the memory: all probabilities at the size of a large photo are many
        gigabytes. They are on the model's device. The argument and the errors are those of
        `forward`.
        """
        return self._bands(to_tensor(image))

    def _label_bands(self, image: Tensor) -> Iterator[Tensor]:
        """Yields labels (rows, W) of an image (3, H, W), uint8, from top to bottom.

        A subclass overrides this method if labels take less work than probabilities.
        """
        return (labels for labels, _ in self._bands(image))

    def _bands(self, image: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the bands of an image (3, H, W), uint8; see `bands`."""
        raise NotImplementedError
