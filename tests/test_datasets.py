"""The data sets, read from tiny folders in the real formats, and the table of protocols."""

import numpy as np
import pytest
from PIL import Image

from scclip_fast.evaluate import PROTOCOLS, DataError, DatasetNotFoundError
from scclip_fast.scenes import draw

SIZES = ((6, 4), (5, 9))  # width and height of the two images

# Paths of image, labels and split file; values in the label files; their indices of classes.
LAYOUTS = {
    "voc21": (
        "VOCdevkit/VOC2012/JPEGImages/{}.jpg",
        "VOCdevkit/VOC2012/SegmentationClass/{}.png",
        "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
        (0, 1, 20, 255),
        (0, 1, 20, 255),
    ),
    "context60": (
        "VOCdevkit/VOC2010/JPEGImages/{}.jpg",
        "VOCdevkit/VOC2010/SegmentationClassContext/{}.png",
        "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt",
        (0, 1, 59),
        (0, 1, 59),
    ),
    "coco-stuff": (
        "coco_stuff164k/images/val2017/{}.jpg",
        "coco_stuff164k/annotations/val2017/{}_labelTrainIds.png",
        None,
        (0, 170, 255),
        (0, 170, 255),
    ),
    "coco-object": (
        "coco_object/images/val2017/{}.jpg",
        "coco_object/annotations/val2017/{}_instanceTrainIds.png",
        None,
        (0, 1, 80),
        (0, 1, 80),
    ),
    "cityscapes": (
        "cityscapes/leftImg8bit/val/{}_leftImg8bit.png",
        "cityscapes/gtFine/val/{}_gtFine_labelTrainIds.png",
        None,
        (0, 18, 255),
        (0, 18, 255),
    ),
    "ade20k": (
        "ade/ADEChallengeData2016/images/validation/{}.jpg",
        "ade/ADEChallengeData2016/annotations/validation/{}.png",
        None,
        (0, 1, 2, 150),
        (255, 0, 1, 149),
    ),
}
LAYOUTS["voc20"] = (*LAYOUTS["voc21"][:4], (255, 0, 19, 255))
LAYOUTS["context59"] = (*LAYOUTS["context60"][:4], (255, 0, 58))
NAMES = {"cityscapes": ("frankfurt/a_1", "lindau/b_2")}


def write_labels(path, labels):
    """Writes labels as VOC does: an index for each pixel, with a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    image.putpalette(bytes(range(256)) * 3)
    image.save(path)


def write_dataset(data, key):
    """Writes two images into the folder `data`; returns their names and raw labels (H, W)."""
    image_path, labels_path, split, values, _ = LAYOUTS[key]
    names = NAMES.get(key, ("000001", "000002"))
    labels = []
    for i, (name, (width, height)) in enumerate(zip(names, SIZES, strict=True)):
        path = data / image_path.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if i else "RGB", (width, height), i and 200).save(path)
        labels.append(np.resize(np.array(values, np.uint8), (height, width)))
        write_labels(data / labels_path.format(name), labels[-1])
    if split:
        (data / split).parent.mkdir(parents=True)
        (data / split).write_text("".join(f"{name}\n" for name in reversed(names)))
        names, labels = names[::-1], labels[::-1]
    return names, labels


@pytest.mark.parametrize("key", LAYOUTS)
def test_samples(tmp_path, key):
    names, raw = write_dataset(tmp_path, key)
    dataset = PROTOCOLS[key].dataset(tmp_path)
    assert len(dataset) == 2
    to_class = dict(zip(*LAYOUTS[key][3:], strict=True))
    for i, (name, labels) in enumerate(zip(names, raw, strict=True)):
        sample = dataset[i]
        assert sample.name == dataset.names[i] == name
        assert (sample.image.mode, sample.image.size) == ("RGB", labels.shape[::-1])
        assert sample.labels.dtype == np.uint8
        assert np.array_equal(sample.labels, np.vectorize(to_class.get)(labels))


@pytest.mark.parametrize("key", LAYOUTS)
def test_root_may_be_any_folder_above(tmp_path, key):
    write_dataset(tmp_path, key)
    home = tmp_path / PROTOCOLS[key].dataset.home
    roots = [tmp_path, *(p for p in (home, *home.parents) if tmp_path in p.parents)]
    assert len(roots) in (2, 3)
    for root in roots:
        assert PROTOCOLS[key].dataset(root).folder == home


def test_only_the_split_counts_and_limit_takes_its_first(tmp_path):
    write_dataset(tmp_path, "voc21")
    split = tmp_path / LAYOUTS["voc21"][2]
    assert PROTOCOLS["voc21"].dataset(tmp_path, limit=1).names == ["000002"]
    split.write_text("000001\n")
    assert PROTOCOLS["voc21"].dataset(tmp_path).names == ["000001"]
    split.unlink()
    with pytest.raises(DatasetNotFoundError, match=r"val\.txt is not there; get http"):
        PROTOCOLS["voc21"].dataset(tmp_path)


def test_files_of_the_system_are_no_images(tmp_path):
    write_dataset(tmp_path, "ade20k")
    (tmp_path / LAYOUTS["ade20k"][0].format("._000001")).write_bytes(b"")
    assert PROTOCOLS["ade20k"].dataset(tmp_path).names == ["000001", "000002"]


@pytest.mark.parametrize("key", LAYOUTS)
def test_missing_folder(tmp_path, key):
    dataset = PROTOCOLS[key].dataset
    with pytest.raises(DatasetNotFoundError) as error:
        dataset(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(tmp_path / dataset.home), *dataset.folders, dataset.source):
        assert part in message


def test_labels_that_were_not_converted(tmp_path):
    write_dataset(tmp_path, "cityscapes")
    for path in tmp_path.rglob("*labelTrainIds.png"):
        path.rename(path.with_name(path.name.replace("TrainIds", "Ids")))
    with pytest.raises(DatasetNotFoundError, match=r"2 of 2 labels .*/cityscapes\.py"):
        PROTOCOLS["cityscapes"].dataset(tmp_path)


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def empty(path):
    path.write_bytes(b"")


def crop(path):
    write_labels(path, np.zeros((3, 3), np.uint8))


def color(path):
    Image.new("RGB", SIZES[1]).save(path)


def unknown_class(path):
    write_labels(path, np.full(SIZES[1][::-1], 21, np.uint8))


DAMAGES = {
    "image missing": (0, remove, "No such file"),
    "image truncated": (0, truncate, "runcated"),
    "image empty": (0, empty, "not an image"),
    "labels missing": (1, remove, "No such file"),
    "labels truncated": (1, truncate, ""),
    "labels of another size": (1, crop, "labels of 3 x 3 pixels for an image of 5 x 9"),
    "labels in colour": (1, color, "a mask of colours (RGB); a mask is a PNG of 8 or 16 bits"),
    "labels beyond the classes": (1, unknown_class, "label 21, where VOC21 has 0 to 20"),
}


@pytest.mark.parametrize(("which", "damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_sample(tmp_path, which, damage, reason):
    write_dataset(tmp_path, "voc21")
    dataset = PROTOCOLS["voc21"].dataset(tmp_path)
    path = dataset.paths("000002")[which]
    damage(path)
    with pytest.raises(DataError) as error:
        dataset[0]
    message = str(error.value)
    assert message.startswith(f"{path}: ") and reason in message and "\n" not in message
    assert dataset[1].name == "000001"


def test_photos_are_upright_and_of_eight_bits(tmp_path):
    write_dataset(tmp_path, "voc21")
    dataset = PROTOCOLS["voc21"].dataset(tmp_path)
    path, labels = dataset.paths("000002")[0], dataset[0].labels
    levels = np.arange(labels.size).reshape(labels.shape).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: stored a quarter turn to the left
    Image.fromarray(np.rot90(257 * levels + 40000)).save(path, format="PNG", exif=exif)
    photo = np.asarray(dataset[0].image)
    np.testing.assert_array_equal(photo, np.repeat((257 * levels + 40000 >> 8)[..., None], 3, 2))


def test_scenes():
    dataset = PROTOCOLS["scenes"].dataset()
    assert len(dataset) == 500
    name, image, labels = PROTOCOLS["scenes"].dataset(limit=3)[2]
    expected = draw.scene("benchmark", 2)
    assert name == dataset.names[2]
    assert np.array_equal(image, expected.image) and np.array_equal(labels, expected.labels)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_one_entry_a_class(protocol):
    names = protocol.class_names()
    assert len(names) == protocol.dataset.num_classes
    assert len({entry.split(",")[0] for entry in names}) == len(names)
    assert all(name and name == name.strip(" ") for entry in names for name in entry.split(", "))


def test_published_names():
    voc20, voc21 = (PROTOCOLS[name].class_names() for name in ("voc20", "voc21"))
    assert voc21[1:] == voc20
    assert voc20[3] == "ship" and voc20[-1].split(", ")[1] == "tv monitor"
    assert PROTOCOLS["coco-object"].class_names()[0] == voc21[0]
    assert voc21[0].startswith("sky, wall, tree") and len(voc21[0].split(", ")) == 26
    context59, context60 = (PROTOCOLS[name].class_names() for name in ("context59", "context60"))
    assert context60 == ["background", *context59]
    assert PROTOCOLS["scenes"].class_names() == list(draw.CLASSES)


def test_published_settings():
    settings = {
        name: (p.short_side, p.logit_scale, p.prob_thd, p.area_thd, p.background)
        for name, p in PROTOCOLS.items()
    }
    plain = (336, 40, 0, None, None)
    assert settings == {
        "voc20": plain,
        "voc21": (336, 50, 0.15, 0.1, 0),
        "context59": plain,
        "context60": (336, 40, 0.15, None, 0),
        "coco-object": (336, 55, 0.35, None, 0),
        "coco-stuff": plain,
        "cityscapes": (560, 40, 0, None, None),
        "ade20k": plain,
        "scenes": (None, 40, 0, None, None),
    }
