"""A user's own data set: a folder of images and a folder of masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .files import DatasetNotFoundError, find_files, find_photos, mask_values
from .paired_dataset import IGNORED, PairedDataset, check_limit

_COLORED = ("RGB", "RGBA")


class OwnDataset(PairedDataset):
    """Images with masks of the same names, in one folder or in two, and in folders below them.

    A mask is a PNG. The indices of a palette and grey values of 8 or 16 bits are the indices of
    classes. Masks of colours need `colors`. Ignored pixels have the label -1.

    Args:
        images: the folder of the images, of any format with a usual suffix.
        masks: the folder of the masks.
        num_classes: the number of classes.
        ignored: the value in a mask of pixels that do not count; None if all count.
        colors: (colours, 3), uint8, the colour of each value in masks of colours.
        suffix: what a mask's file has after the name of its image: the mask of "a/b.jpg" is
            "a/b.png", or "a/b_mask.png" for the suffix "_mask.png".
        limit: number of images to use, at least 1: the first by name. None uses all.
        allow_missing: whether images without a mask, and masks without an image, are left out,
            instead of being an error.

    Raises:
        ValueError: num_classes or the limit is below 1, or `ignored` is the index of a class.
        DatasetNotFoundError: a folder is not there or is empty, or images or masks are missing.
        DataError: two files have the same name, or no mask has a label besides 0 and `ignored`.
    """

    source = "every image needs a mask and every mask an image of the same name"

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        num_classes: int,
        *,
        ignored: int | None = IGNORED,
        colors: np.ndarray | None = None,
        suffix: str = ".png",
        limit: int | None = None,
        allow_missing: bool = False,
    ) -> None:
        check_limit(limit)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if ignored is not None and 0 <= ignored < num_classes:
            raise ValueError(
                f"ignored must be no index of a class, 0 to {num_classes - 1}, got {ignored}"
            )
        self.folder, mask_folder = Path(images), Path(masks)
        for folder in (self.folder, mask_folder):
            if not folder.is_dir():
                raise DatasetNotFoundError(f"there is no folder {folder}")
        self.num_classes, self.ignored, self.suffixes = num_classes, ignored, (".*", suffix)
        self._colors = None if colors is None else _codes(np.asarray(colors))
        labels = find_files(mask_folder, suffix)
        if not labels:
            raise DatasetNotFoundError(f"{mask_folder}: there is no mask, no *{suffix}")
        photos = find_photos(self.folder, labels.values())
        self._pair = (self.folder, photos), (mask_folder, labels)
        self._use(sorted(photos.keys() | labels), limit, allow_missing)

    def _values(self, mask: Image.Image) -> np.ndarray:
        if mask.mode not in _COLORED:
            return mask_values(mask)
        if self._colors is None:
            raise ValueError(
                f"a mask of colours ({mask.mode}) needs a list of the classes' colours"
            )
        codes = _codes(np.asarray(mask.convert("RGB")))
        order = np.argsort(self._colors)
        places = np.searchsorted(self._colors, codes, sorter=order).clip(max=len(order) - 1)
        values = order[places]
        unknown = self._colors[values] != codes
        if unknown.any():
            code = int(codes[unknown][0])
            color = f"{code >> 16} {code >> 8 & 255} {code & 255}"
            raise ValueError(f"{unknown.sum()} pixels have colours without a class, as {color}")
        return values

    def _class_indices(self, values: np.ndarray) -> np.ndarray:
        """Returns the index of a class, int32, or -1."""
        return np.where(values == self.ignored, -1, values.astype(np.int32))


def _codes(colors: np.ndarray) -> np.ndarray:
    """Returns a number (...), int64, for each colour (..., 3)."""
    return colors.astype(np.int64) @ np.array([65536, 256, 1])
