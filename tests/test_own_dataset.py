"""A user's own images and masks: every format of masks, folders in folders, faults."""

import numpy as np
import pytest
from PIL import Image

from scclip_fast.evaluate import (
    DataError,
    DatasetNotFoundError,
    MissingFilesError,
    OwnDataset,
    confusion_matrix,
    read_colors,
)

COLORS = np.array([[0, 0, 0], [200, 10, 255], [10, 200, 255], [9, 9, 9]], np.uint8)
LABELS = np.array([[0, 1, 2], [2, 255, 1]])


def indexed(labels):
    mask = Image.fromarray(labels.astype(np.uint8), "P")
    mask.putpalette(np.random.default_rng(0).bytes(768))
    return mask


#: A mask of LABELS in each format. In the colours, 255 is the fourth.
FORMATS = {
    "indexed": indexed,
    "grey": lambda labels: Image.fromarray(labels.astype(np.uint8)),
    "16 bits": lambda labels: Image.fromarray(labels.astype(np.uint16)),
    "colours": lambda labels: Image.fromarray(COLORS[np.minimum(labels, 3)]),
    "opacity": lambda labels: Image.fromarray(COLORS[np.minimum(labels, 3)]).convert("RGBA"),
}


def write(folder, name, mask=None, image_suffix=".jpg", suffix=".png"):
    """Writes an image and its mask into test/ and testannot/, as in CamVid."""
    mask = FORMATS["grey"](LABELS) if mask is None else mask
    for path in (folder / "test" / name, folder / "testannot" / name):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", mask.size, (9, 8, 7)).save(folder / "test" / f"{name}{image_suffix}")
    mask.save(folder / "testannot" / f"{name}{suffix}")


def own(folder, num_classes=3, **options):
    return OwnDataset(folder / "test", folder / "testannot", num_classes, **options)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_of_masks(tmp_path, kind):
    write(tmp_path, "a", FORMATS[kind](LABELS))
    of_colors = dict(colors=COLORS, ignored=3) if kind in ("colours", "opacity") else {}
    (sample,) = own(tmp_path, **of_colors)
    assert (sample.name, sample.image.size) == ("a", (3, 2))
    assert np.array_equal(sample.labels, np.where(LABELS == 255, -1, LABELS))


def test_labels_beyond_8_bits(tmp_path):
    labels = np.array([[0, 255, 256, 1202, 65535]])
    write(tmp_path, "a", FORMATS["16 bits"](labels))
    (sample,) = own(tmp_path, 1203, ignored=65535)
    assert sample.labels.tolist() == [[0, 255, 256, 1202, -1]]
    prediction = sample.image.size[0] * [1202]
    import torch

    counts = confusion_matrix(torch.tensor([prediction]), sample.labels, 1203)
    assert counts.sum() == 4 and counts[:, 1202].nonzero()[0].tolist() == [0, 255, 256, 1202]
    with pytest.raises(DataError, match=r"label 65535, where OwnDataset has 0 to 1202; every"):
        own(tmp_path, 1203, ignored=None)


def test_folders_in_folders_and_suffixes(tmp_path):
    write(tmp_path, "b/c", image_suffix=".WEBP", suffix="_mask.PNG")
    write(tmp_path, "a", image_suffix=".tif", suffix="_mask.png")
    (tmp_path / "test" / "notes.txt").write_text("no image")
    assert own(tmp_path, suffix="_mask.png").names == ["a", "b/c"]
    assert own(tmp_path, suffix="_mask.png", limit=1).names == ["a"]
    for path in (tmp_path / "testannot").rglob("*_mask.*"):  # images and masks in one folder
        path.rename(tmp_path / "test" / path.relative_to(tmp_path / "testannot"))
    one = OwnDataset(tmp_path / "test", tmp_path / "test", 3, suffix="_mask.png")
    assert one.names == ["a", "b/c"] and np.array_equal(one[1].labels[0], LABELS[0])


@pytest.mark.parametrize(
    ("which", "kind", "ending"), [("test", "images", ".*"), ("testannot", "labels", ".png")]
)
def test_missing_files(tmp_path, which, kind, ending):
    for index in range(9):
        write(tmp_path, f"x{index}")
    for path in sorted((tmp_path / which).iterdir())[1:8]:
        path.unlink()
    listed = ", ".join(f"x{index}{ending}" for index in range(1, 6))
    message = rf"{which}: 7 of 9 {kind} of OwnDataset are missing \({listed} and 2 more\); every"
    with pytest.raises(MissingFilesError, match=message.replace(".*", r"\.\*")):
        own(tmp_path)
    dataset = own(tmp_path, allow_missing=True)
    assert dataset.names == dataset.all_names == ["x0", "x8"]
    assert dataset.left_out == [f"x{index}" for index in range(1, 8)]


def test_nothing_in_common(tmp_path):
    write(tmp_path, "a")
    (tmp_path / "testannot" / "a.png").rename(tmp_path / "testannot" / "b.png")
    with pytest.raises(DatasetNotFoundError, match="none of 2 images has labels; every"):
        own(tmp_path, allow_missing=True)


FAULTS = {
    "no folder": (dict(masks="none"), DatasetNotFoundError, "there is no folder .*none"),
    "no mask": (dict(suffix=".bmp"), DatasetNotFoundError, r"there is no mask, no \*\.bmp"),
    "classes": (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
    "ignored": (dict(ignored=2), ValueError, "no index of a class, 0 to 2, got 2"),
    "label": (dict(num_classes=2), DataError, "label 2, where OwnDataset has 0 to 1, and 255 for"),
}


@pytest.mark.parametrize(("changed", "kind", "message"), FAULTS.values(), ids=FAULTS)
def test_faults(tmp_path, changed, kind, message):
    write(tmp_path, "a")
    options = dict(images="test", masks="testannot", num_classes=3) | changed
    for name in ("images", "masks"):
        options[name] = tmp_path / options[name]
    with pytest.raises(kind, match=message):
        OwnDataset(**options)


def test_two_photos_of_one_name(tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "a", image_suffix=".png")
    with pytest.raises(DataError, match=r"a\.png and a\.jpg have one name; remove one of them"):
        own(tmp_path)


def test_masks_of_colours(tmp_path):
    write(tmp_path, "a", FORMATS["colours"](LABELS))
    with pytest.raises(DataError, match=r"a\.png: a mask of colours \(RGB\) needs a list of the"):
        own(tmp_path)
    with pytest.raises(DataError, match="1 pixels have colours without a class, as 9 9 9"):
        own(tmp_path, colors=COLORS[:3])
    write(tmp_path, "a", FORMATS["grey"](LABELS))  # values of grey are no colours
    assert np.array_equal(own(tmp_path, colors=COLORS)[0].labels[0], LABELS[0])


def test_lists_of_colours(tmp_path):
    path = tmp_path / "colors.txt"
    path.write_text("64 128 64\tAnimal\n192, 0, 128  Archway\n\n0 0 0\n")
    colors = read_colors(path)
    assert colors.dtype == np.uint8
    assert colors.tolist() == [[64, 128, 64], [192, 0, 128], [0, 0, 0]]
    for text, message in {
        "1 2": "'1 2' has no colour; a line begins with R G B, 0 to 255",
        "1 2 256 x": "has no colour",
        "1 2 3 a\n1 2 3 b": "colours on several lines (1 2 3); leave one line each",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError) as error:
            read_colors(path)
        assert message in str(error.value)
