"""The data sets of the published benchmarks, and the drawn scenes."""

from __future__ import annotations

from PIL import Image

from ..scenes import draw
from .folder_dataset import FolderDataset
from .own_dataset import OwnDataset
from .paired_dataset import Sample, check_limit

_CONVERTERS = "mmsegmentation's tools/dataset_converters"


class VOC21(FolderDataset):
    """Pascal VOC 2012 with its background. The contours of objects are ignored."""

    home = "VOCdevkit/VOC2012"
    folders = ("JPEGImages", "SegmentationClass")
    split = "ImageSets/Segmentation/val.txt"
    num_classes = 21
    source = (
        "get http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar "
        "and unpack it there"
    )


class VOC20(VOC21):
    """Pascal VOC 2012 without its background, whose pixels are ignored."""

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
    """Pascal Context without its background, whose pixels are ignored."""

    num_classes = 59
    reduce_zero_label = True


class COCOStuff(FolderDataset):
    """COCO-Stuff 164k, with 80 things and 91 stuff classes."""

    home = "coco_stuff164k"
    folders = ("images/val2017", "annotations/val2017")
    suffixes = (".jpg", "_labelTrainIds.png")
    num_classes = 171
    source = (
        "get val2017.zip of https://cocodataset.org and stuffthingmaps_trainval2017.zip of "
        f"https://github.com/nightrome/cocostuff and run {_CONVERTERS}/coco_stuff164k.py"
    )


class COCOObject(COCOStuff):
    """The 80 things of COCO. Everything else is background."""

    home = "coco_object"
    suffixes = (".jpg", "_instanceTrainIds.png")
    num_classes = 81
    source = "make it from COCO-Stuff 164k with datasets/cvt_coco_object.py of SC-CLIP or SCLIP"


class Cityscapes(FolderDataset):
    """Cityscapes with its fine annotations."""

    home = "cityscapes"
    folders = ("leftImg8bit/val", "gtFine/val")
    suffixes = ("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
    num_classes = 19
    source = (
        "get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of "
        f"https://www.cityscapes-dataset.com and run {_CONVERTERS}/cityscapes.py"
    )


class ADE20K(FolderDataset):
    """ADE20K's 150 classes. Label 0 stands for everything else and is ignored."""

    home = "ade/ADEChallengeData2016"
    folders = ("images/validation", "annotations/validation")
    num_classes = 150
    reduce_zero_label = True
    source = (
        "get http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip "
        "and unpack it there"
    )


class Scenes:
    """The drawn scenes of `scclip_fast.scenes`, which need no folder. By default there are 500."""

    folder = None
    num_classes = len(draw.CLASSES)

    def __init__(
        self, root: object = None, limit: int | None = None, allow_missing: bool = False
    ) -> None:
        check_limit(limit)
        self.all_names = None  # there is no last scene
        self.left_out: list[str] = []
        self.names = [f"scene {i}" for i in range(500 if limit is None else limit)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Sample:
        scene = draw.scene("benchmark", i)
        return Sample(self.names[i], Image.fromarray(scene.image), scene.labels)


Dataset = FolderDataset | OwnDataset | Scenes
