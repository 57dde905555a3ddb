"""The benchmarks' validation sets, read from the folders that mmsegmentation documents.

Every data set has a length, `names`, and gives at [i] (name, image, labels): a str, an RGB
PIL.Image and a uint8 array (H, W) of class indices in which `IGNORED` pixels don't count.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .. import picture
from ..scenes import draw
from .folders import DataError, DatasetNotFoundError, find_files, mask_values, read_list, some

IGNORED = 255
_CONVERTERS = "mmsegmentation's tools/dataset_converters"


class Sample(NamedTuple):
    name: str  # of the image in its data set: unique, the same on every machine
    image: Image.Image  # RGB
    labels: np.ndarray  # (H, W), uint8


class FolderDataset:
    """Images and label maps in folders, which a subclass names; suffixes count in any case.

    Args:
        root: the data set's own folder, or one above it: the first of `root` and `root` joined with
            the tails of `home`, shortest first, that holds both of `folders`. For VOC2012: `root`,
            `root/VOC2012`, `root/VOCdevkit/VOC2012`.
        limit: only the first so many images, at least 1, in the order of the split file, else of
            their names.

    Raises:
        ValueError: a limit below 1.
        DatasetNotFoundError: no such folder, or images or labels are missing in it.
        DataError: a list of names that can't be read or repeats a name, two files of one name, or
            masks none of which has a label besides 0 and 255, so that no class could be told from
            the background.
    """

    home: str  # below mmsegmentation's data/
    folders: tuple[str, str]  # of images and labels
    suffixes: tuple[str, str] = (".jpg", ".png")  # what follows the name
    split: str | None = None  # a file with a name a line; without one, every image
    num_classes: int
    reduce_zero_label: bool = False  # label 0 is ignored, and label 1 is class 0
    source: str  # how to get it

    def __init__(self, root: str | Path, limit: int | None = None) -> None:
        _check_limit(limit)
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
        """Sample i.

        Raises:
            DataError: a file is missing or damaged, labels that are no indices of classes, or
                image and labels of different sizes.
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
        """The files of the image and of the labels that have one of `names`."""
        return self._images[name], self._labels[name]

    def _find(self, root: Path) -> Path:
        parts = Path(self.home).parts
        tails = [Path(*parts[i:]) for i in range(len(parts), -1, -1)]
        candidates = [root / tail for tail in tails]
        for folder in candidates:
            if all((folder / part).is_dir() for part in self.folders):
                return folder
        raise DatasetNotFoundError(
            f"no {type(self).__name__}: none of {', '.join(map(str, candidates))} holds "
            f"{' and '.join(self.folders)}; {self.source}"
        )

    def _list(self) -> list[str]:
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
        """An image for all labels, and labels for all images."""
        kinds = (("images", self._images), ("labels", self._labels))
        for (kind, files), folder, suffix in zip(kinds, self.folders, self.suffixes, strict=True):
            missing = [f"{name}{suffix}" for name in self.names if name not in files]
            if missing:
                raise DatasetNotFoundError(
                    f"{self.folder / folder}: {len(missing)} of {len(self.names)} {kind} of "
                    f"{type(self).__name__} are missing ({some(missing)}); {self.source}"
                )

    def _check_labels(self) -> None:
        """At least one mask has a label that is neither 0 nor ignored; mostly the first one."""
        unusable = None
        for name in self.names:
            try:
                values = self._mask(self._labels[name])
            except DataError as error:
                unusable = unusable or error
                continue
            if not np.isin(values, (0, IGNORED)).all():
                return
        raise unusable or DataError(
            f"{self._labels[self.names[0]]}: in this mask and the other {len(self.names) - 1} "
            f"there are no labels but 0 and 255, so that nothing can be scored; a mask has the "
            f"index of a class a pixel; {self.source}"
        )

    def _mask(self, path: Path) -> np.ndarray:
        """The file's values, each of which stands for a class or for no class."""
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
        if self.reduce_zero_label:
            values = np.where(np.isin(values, (0, IGNORED)), IGNORED, values.astype(int) - 1)
        return values.astype(np.uint8)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")


def _photo(path: Path) -> Image.Image:
    try:
        return picture.read(path)
    except picture.PictureError as error:
        raise DataError(str(error)) from error


def _read(path: Path, convert: Callable):
    """The file's image, decoded by `convert`; DataError where it is missing or damaged."""
    try:
        with Image.open(path) as image:
            return convert(image)
    # What PIL raises for damaged files, by format.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {reason.splitlines()[0]}") from error


class VOC21(FolderDataset):
    """Pascal VOC 2012 with its background; the contours of objects are ignored."""

    home = "VOCdevkit/VOC2012"
    folders = ("JPEGImages", "SegmentationClass")
    split = "ImageSets/Segmentation/val.txt"
    num_classes = 21
    source = (
        "get http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar "
        "and unpack it there"
    )


class VOC20(VOC21):
    """The same images without the background: its pixels are ignored."""

    num_classes = 20
    reduce_zero_label = True


class Context60(FolderDataset):
    """Pascal Context with its background."""

    home = "VOCdevkit/VOC2010"
    folders = ("JPEGImages", "SegmentationClassContext")
    split = "ImageSets/SegmentationContext/val.txt"
    num_classes = 60
    source = (
        "get http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar and make "
        f"the labels with {_CONVERTERS}/pascal_context.py"
    )


class Context59(Context60):
    """The same images without the background: its pixels are ignored."""

    num_classes = 59
    reduce_zero_label = True


class COCOStuff(FolderDataset):
    """COCO-Stuff 164k."""

    home = "coco_stuff164k"
    folders = ("images/val2017", "annotations/val2017")
    suffixes = (".jpg", "_labelTrainIds.png")
    num_classes = 171
    source = (
        "get val2017.zip of https://cocodataset.org and stuffthingmaps_trainval2017.zip of "
        f"https://github.com/nightrome/cocostuff and run {_CONVERTERS}/coco_stuff164k.py"
    )


class COCOObject(COCOStuff):
    """The 80 things of COCO, all the rest background."""

    home = "coco_object"
    suffixes = (".jpg", "_instanceTrainIds.png")
    num_classes = 81
    source = "make it from COCO-Stuff 164k with datasets/cvt_coco_object.py of SC-CLIP or SCLIP"


class Cityscapes(FolderDataset):
    """Cityscapes, fine annotations."""

    home = "cityscapes"
    folders = ("leftImg8bit/val", "gtFine/val")
    suffixes = ("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
    num_classes = 19
    source = (
        "get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of "
        f"https://www.cityscapes-dataset.com and run {_CONVERTERS}/cityscapes.py"
    )


class ADE20K(FolderDataset):
    """ADE20K's 150 classes; label 0, all the rest, is ignored."""

    home = "ade/ADEChallengeData2016"
    folders = ("images/validation", "annotations/validation")
    num_classes = 150
    reduce_zero_label = True
    source = (
        "get http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip "
        "and unpack it there"
    )


class Scenes:
    """The drawn scenes of `scclip_fast.scenes`: no folder, as many as you like."""

    folder = None
    num_classes = len(draw.CLASSES)

    def __init__(self, root: object = None, limit: int | None = None) -> None:
        _check_limit(limit)
        self.all_names = None  # endless
        self.names = [f"scene {i}" for i in range(500 if limit is None else limit)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Sample:
        scene = draw.scene("benchmark", i)
        return Sample(self.names[i], Image.fromarray(scene.image), scene.labels)
