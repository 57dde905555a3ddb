"""The layout of the published data sets: two folders, as mmsegmentation documents them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .files import DatasetNotFoundError, find_files, read_list
from .paired_dataset import IGNORED, PairedDataset, check_limit


class FolderDataset(PairedDataset):
    """A published data set; a subclass states its folders. Ignored pixels have the label 255.

    Args:
        root: the data set's own folder, or one above it. The data set is in the first folder that
            holds both of `folders`, among `root` and `root` joined with the tails of `home`,
            shortest first. For VOC2012: `root`, `root/VOC2012`, `root/VOCdevkit/VOC2012`.
        limit: number of images to use, at least 1: the first in the order of the split file, or of
            their names if there is none. None uses all.
        allow_missing: whether names without an image or without labels are left out, instead of
            being an error.

    Raises:
        ValueError: the limit is below 1.
        DatasetNotFoundError: there is no such folder, or images or labels are missing in it.
        DataError: the list of names cannot be read or repeats a name, two files have the same name,
            or no mask has a label besides 0 and 255, so that no class could be told from the
            background.
    """

    home: str  # the data set's folder below mmsegmentation's data/
    folders: tuple[str, str]  # of images and of labels, below `home`
    split: str | None = None  # a text file with a name a line; None uses every image

    def __init__(
        self, root: str | Path, limit: int | None = None, allow_missing: bool = False
    ) -> None:
        check_limit(limit)
        self.folder = self._find(Path(root))
        images, labels = (
            (self.folder / folder, find_files(self.folder / folder, suffix))
            for folder, suffix in zip(self.folders, self.suffixes, strict=True)
        )
        self._pair = images, labels
        self._use(self._list(), limit, allow_missing)

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
            names = sorted(self._pair[0][1].keys() | self._pair[1][1])
            if not names:
                folder, suffix = self.folder / self.folders[0], self.suffixes[0]
                raise DatasetNotFoundError(f"{folder}: there is no *{suffix}; {self.source}")
            return names
        split = self.folder / self.split
        if not split.is_file():
            raise DatasetNotFoundError(f"{split} is not there; {self.source}")
        return read_list(split)

    def _class_indices(self, values: np.ndarray) -> np.ndarray:
        """Returns the index of a class or `IGNORED`, uint8, for each value of a mask."""
        if self.reduce_zero_label:
            values = np.where(np.isin(values, (0, IGNORED)), IGNORED, values.astype(int) - 1)
        return values.astype(np.uint8)
