"""What data sets of images and masks in two folders have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..segment import image as images
from .files import (
    DataError,
    DatasetNotFoundError,
    MissingFilesError,
    listed,
    mask_values,
)

IGNORED = 255  # the label of pixels that do not count


class Sample(NamedTuple):
    """An image of a data set with its labels."""

    name: str  # unique in the data set, and the same on every machine
    image: Image.Image  # RGB
    labels: np.ndarray  # (H, W): indices of classes; any other number is a pixel not to count


class PairedDataset:
    """Images and masks of the same names in two folders. A subclass finds them.

    A data set has a length and gives a `Sample` at each index. The suffixes of files count in small
    and in capital letters.

    Attributes:
        names: the names of the images in use.
        all_names: the names of all images.
        left_out: the names that have only an image or only a mask, if these are allowed.
    """

    suffixes: tuple[str, str] = (".jpg", ".png")  # of images and of labels, after the name
    num_classes: int
    ignored: int | None = IGNORED  # the value in a mask of pixels that do not count
    reduce_zero_label: bool = False  # whether label 0 is ignored, and label 1 is class 0
    source: str  # how to get the data set, or its missing files
    #: The folders of images and of labels, and the files in them by name.
    _pair: tuple[tuple[Path, dict[str, Path]], tuple[Path, dict[str, Path]]]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Sample:
        """Reads an image and its labels.

        Raises:
            DataError: a file is missing or damaged, a label is no index of a class, or image and
                labels differ in size.
        """
        name = self.names[i]
        image_path, labels_path = self.paths(name)
        image = _photo(image_path)
        labels = self._class_indices(self._mask(labels_path))
        if labels.shape != (image.height, image.width):
            raise DataError(
                f"{labels_path}: labels of {labels.shape[1]} x {labels.shape[0]} pixels "
                f"for an image of {image.width} x {image.height}"
            )
        return Sample(name, image, labels)

    def paths(self, name: str) -> tuple[Path, Path]:
        """Returns the files of the image and of the labels of a name."""
        (_, images), (_, labels) = self._pair
        return images[name], labels[name]

    def _use(self, names: list[str], limit: int | None, allow_missing: bool) -> None:
        """Chooses the names in use, and checks that they have images and labels."""
        (_, images), (_, labels) = self._pair
        self.all_names, self.left_out = names, []
        if allow_missing:
            self.left_out = [name for name in names if name not in images or name not in labels]
            self.all_names = [name for name in names if name in images and name in labels]
        self.names = self.all_names[:limit]
        self._check_complete()
        self._check_labels()

    def _check_complete(self) -> None:
        """Checks that every name has an image and labels."""
        if not self.names:
            raise DatasetNotFoundError(
                f"{self._pair[0][0]}: none of {len(self.left_out)} images has labels; {self.source}"
            )
        for kind, (folder, files), suffix in zip(
            ("images", "labels"), self._pair, self.suffixes, strict=True
        ):
            missing = [f"{name}{suffix}" for name in self.names if name not in files]
            if missing:
                raise MissingFilesError(
                    f"{folder}: {len(missing)} of {len(self.names)} {kind} of "
                    f"{type(self).__name__} are missing ({listed(missing)}); {self.source}"
                )

    def _check_labels(self) -> None:
        """Checks that a mask has a label that is neither 0 nor ignored.

        The first mask mostly has one, so that only a few are read.
        """
        first_error = None
        for name in self.names:
            try:
                values = self._mask(self.paths(name)[1])
            except DataError as error:
                first_error = first_error or error
                continue
            if ((values != 0) & (values != self.ignored)).any():
                return
        ignored = "" if self.ignored is None else f" and {self.ignored}"
        raise first_error or DataError(
            f"{self.paths(self.names[0])[1]}: in this mask and the other {len(self.names) - 1} "
            f"there are no labels but 0{ignored}, so that nothing can be scored; a mask has the "
            f"index of a class a pixel; {self.source}"
        )

    def _mask(self, path: Path) -> np.ndarray:
        """Returns the values of a mask, and checks that each is a class or ignored."""
        values = _read(path, self._values)
        last = self.num_classes - 1 + self.reduce_zero_label
        counted = True if self.ignored is None else values != self.ignored
        highest = np.max(values, where=counted, initial=0)
        if highest > last:
            ignored = (
                "" if self.ignored is None else f", and {self.ignored} for pixels that do not count"
            )
            raise DataError(
                f"{path}: label {highest}, where {type(self).__name__} has 0 to {last}{ignored}; "
                f"{self.source}"
            )
        return values

    def _values(self, mask: Image.Image) -> np.ndarray:
        """Returns the values (H, W) of an opened mask; raises ValueError if it has none."""
        return mask_values(mask)

    def _class_indices(self, values: np.ndarray) -> np.ndarray:
        """Returns the index of a class, or a number that is none, for each value of a mask."""
        raise NotImplementedError


def check_limit(limit: int | None) -> None:
    """Raises ValueError for a limit below 1."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")


def _photo(path: Path) -> Image.Image:
    try:
        return images.read(path)
    except images.ImageError as error:
        raise DataError(str(error)) from error


def _read(path: Path, convert: Callable):
    """Opens an image file and returns `convert(image)`; raises DataError if it is damaged."""
    try:
        with Image.open(path) as image:
            return convert(image)
    # The decoders of the formats raise different errors for damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {reason.splitlines()[0]}") from error
