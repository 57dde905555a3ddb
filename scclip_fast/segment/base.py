"""The protocol of both segmenters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn

from .image import ImageLike, to_tensor

Band = tuple[Tensor, Tensor]  # labels (rows, W) and probabilities (classes, rows, W)


_IMAGES = 8  # of a list that are in memory at a time


class ImageSegmenter(nn.Module):
    """A frozen model and class names. A subclass implements `_bands`.

    Attributes:
        classes: the name of each class, in the order of the labels.
    """

    classes: list[str]

    @overload
    def forward(self, image: ImageLike) -> Tensor: ...

    @overload
    def forward(self, image: list[Any] | tuple[Any, ...]) -> list[Tensor]: ...

    @torch.inference_mode()
    def forward(self, image: ImageLike | list[Any] | tuple[Any, ...]) -> Tensor | list[Tensor]:
        """Returns the class of each pixel.

        Args:
            image: the path of a file, a PIL image of any mode, which `image.to_rgb` makes upright
                RGB, or RGB as a uint8 array or tensor (H, W, 3); or a list of these.

        Returns:
            (H, W), int64, on the CPU: indices into `classes`, of the upright image's size. For a
            list of images, a list of these.

        Raises:
            TypeError: the argument is no image.
            ValueError: a file cannot be read; the image is not (H, W, 3), is empty or has values
                that are no grey (see `image.to_rgb`); or the model's results are not finite.
        """
        if not isinstance(image, list | tuple):
            return self._labels_of([image])[0]
        return self._labels_of(image)

    def _labels_of(self, images: list[Any] | tuple[Any, ...]) -> list[Tensor]:
        labels: list[Tensor] = []
        for start in range(0, len(images), _IMAGES):
            pixels = [to_tensor(one) for one in images[start : start + _IMAGES]]
            found = zip(pixels, self._label_bands(pixels), strict=True)
            labels.extend(_joined(bands, one.shape[1:]) for one, bands in found)
        return labels

    @torch.inference_mode()
    def probabilities(self, image: ImageLike) -> Tensor:
        """Returns the probability of each class, (classes, H, W), float32, on the CPU.

        The argument and the errors are those of `forward`.
        """
        return torch.cat([probabilities.cpu() for _, probabilities in self.bands(image)], dim=1)

    @overload
    def bands(self, image: ImageLike) -> Iterator[Band]: ...

    @overload
    def bands(self, image: list[Any] | tuple[Any, ...]) -> Iterator[Iterator[Band]]: ...

    @torch.inference_mode()
    def bands(
        self, image: ImageLike | list[Any] | tuple[Any, ...]
    ) -> Iterator[Band] | Iterator[Iterator[Band]]:
        """Yields labels (rows, W) and probabilities (classes, rows, W) from top to bottom.

        The bands bound the memory: all probabilities at the size of a large photo are many
        gigabytes. They are on the model's device. For a list of images, yields such an iterator for
        each image; all of them are in memory. The argument and the errors are those of `forward`.
        """
        if isinstance(image, list | tuple):
            return self._bands([to_tensor(one) for one in image])
        return next(self._bands([to_tensor(image)]))

    def _label_bands(self, images: list[Tensor]) -> Iterator[Iterator[Tensor]]:
        """Yields, for each image (3, H, W), uint8, its labels (rows, W) from top to bottom.

        A subclass overrides this method if labels take less work than probabilities.
        """
        return ((labels for labels, _ in bands) for bands in self._bands(images))

    def _bands(self, images: list[Tensor]) -> Iterator[Iterator[Band]]:
        """Yields the bands of each image (3, H, W), uint8; see `bands`."""
        raise NotImplementedError


def _joined(bands: Iterable[Tensor], size: torch.Size) -> Tensor:
    """Returns labels (H, W), int64, on the CPU, of bands (rows, W)."""
    labels, top = torch.empty(size, dtype=torch.int64), 0
    for band in bands:
        labels[top : top + len(band)] = band
        top += len(band)
    return labels
