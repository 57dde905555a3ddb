"""A data set in folders, as mmsegmentation documents them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..segment import image as images
from .files import DataError, DatasetNotFoundError, find_files, listed, mask_values, read_list

IGNORED = 255  # the label of pixels that do not count


class Sample(NamedTuple):
    """An image of a data set with its labels."""

    name: str  # unique in the data set, and the same on every machine
    image: Image.Image  # RGB
    labels: np.ndarray  # (H, W), uint8: indices of classes, or IGNORED


class FolderDataset:
    """Images and label maps in two folders; a subclass states which.

    A data set has a length and gives a `Sample` at each index. The suffixes of files count in small
    and in capital letters.

    Args:
        root: the data set's own folder, or one above it. The data set is in the first folder that
            holds both of `folders`, among `root` and `root` joined with the tails of `home`,
            shortest first. For VOC2012: `root`, `root/VOC2012`, `root/VOCdevkit/VOC2012`.
        limit: number of images to use, at least 1: the first in the order of the split file, or of
            their names if there is none. None uses all.

    Attributes:
        names: the names of the images in use.
        all_names: the names of all images.

    Raises:
        ValueError: the limit is below 1.
        DatasetNotFoundError: there is no such folder, or images or labels are missing in it.
        DataError: the list of names cannot be read or repeats a name, two files have the same name,
            or no mask has a label besides 0 and 255, so that no class could be told from the
            background.
    """

    home: str  # the data set's folder below mmsegmentation's data/
    folders: tuple[str, str]  # of images and of labels, below `home`
    suffixes: tuple[str, str] = (".jpg", ".png")  # of images and of labels, after the name
    split: str | None = None  # a text file with a name a line; None uses every image
    num_classes: int
    reduce_zero_label: bool = False  # whether label 0 is ignored, and label 1 is class 0
    source: str  # how to get the data set

    def __init__(self, root: str | Path, limit: int | None = None) -> None:
        check_limit(limit)
        self.folder = self._find(Path(root))
        self._images, self._labels = (
            find_files(self.folder / folder, suffix)
            for folder, suffix in zip(self.folders, self.suffixes, strict=True)
        )
        self.all_names = self._list()
        self.names = self.all_names[:limit]
        self._check_complete()
        self._check_labels()

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
        return self._images[name], self._labels[name]

    def _find(self, root: Path) -> Path:
        """Returns the data set's folder at or below `root`."""
        parts = Path(self.home).parts
        tails = [Path(*parts[i:]) for i in range(len(parts), -1, -1)]
        candidates = [root / tail for tail in tails]
        for folder in candidates:
            if all((folder / name).is_dir() for name in self.folders):
                return folder
        raise DatasetNotFoundError(
            f"no {type(self).__name__}: none of {', '.join(map(str, candidates))} holds "
            f"{' and '.join(self.folders)}; {self.source}"
        )

    def _list(self) -> list[str]:
        """Returns the names of all images."""
        if not self.split:
            names = sorted(self._images.keys() | self._labels)
            if not names:
                folder, suffix = self.folder / self.folders[0], self.suffixes[0]
                raise DatasetNotFoundError(f"{folder}: there is no *{suffix}; {self.source}")
            return names
        split = self.folder / self.split
        if not split.is_file():
            raise DatasetNotFoundError(f"{split} is not there; {self.source}")
        return read_list(split)

    def _check_complete(self) -> None:
        """Checks that every name has an image and labels."""
        kinds = (("images", self._images), ("labels", self._labels))
        for (kind, files), folder, suffix in zip(kinds, self.folders, self.suffixes, strict=True):
            missing = [f"{name}{suffix}" for name in self.names if name not in files]
            if missing:
                raise DatasetNotFoundError(
                    f"{self.folder / folder}: {len(missing)} of {len(self.names)} {kind} of "
                    f"{type(self).__name__} are missing ({listed(missing)}); {self.source}"
                )

    def _check_labels(self) -> None:
        """Checks that a mask has a label that is neither 0 nor ignored.

        The first mask mostly has one, so that only a few are read.
        """
        first_error = None
        for name in self.names:
            try:
                values = self._mask(self._labels[name])
            except DataError as error:
                first_error = first_error or error
                continue
            if not np.isin(values, (0, IGNORED)).all():
                return
        raise first_error or DataError(
            f"{self._labels[self.names[0]]}: in this mask and the other {len(self.names) - 1} "
            f"there are no labels but 0 and 255, so that nothing can be scored; a mask has the "
            f"index of a class a pixel; {self.source}"
        )

    def _mask(self, path: Path) -> np.ndarray:
        """Returns the values of a mask, and checks that each is a class or `IGNORED`."""
        values = _read(path, mask_values)
        last = self.num_classes - 1 + self.reduce_zero_label
        highest = np.max(values, where=values != IGNORED, initial=0)
        if highest > last:
            raise DataError(
                f"{path}: label {highest}, where {type(self).__name__} has 0 to {last}, and 255 "
                f"for pixels that do not count; {self.source}"
            )
        return values

    def _class_indices(self, values: np.ndarray) -> np.ndarray:
        """Returns the index of a class or `IGNORED`, uint8, for each value of a mask."""
        if self.reduce_zero_label:
            values = np.where(np.isin(values, (0, IGNORED)), IGNORED, values.astype(int) - 1)
        return values.astype(np.uint8)


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
