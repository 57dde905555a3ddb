"""Faults of data sets: harmless ones are read, others raise an error with file and remedy."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from test_datasets import LAYOUTS, SIZES, write_dataset, write_labels

from scclip_fast.evaluate import PROTOCOLS, DataError, DatasetNotFoundError


def files(root, key, which):
    """Returns the images (0) or masks (1) of a data set on disk, sorted by name."""
    return sorted(root.glob(LAYOUTS[key][which].format("*").replace("*_", "**/*_")))


def rewrite_labels(root, key, values):
    for path in files(root, key, 1):
        size = Image.open(path).size
        write_labels(path, np.resize(np.array(values, np.uint8), size[::-1]))


def error_of(root, key, kind=DataError, **options):
    with pytest.raises(kind) as error:
        PROTOCOLS[key].dataset(root, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("key", LAYOUTS)
def test_suffixes_count_in_any_case(tmp_path, key):
    names, raw = write_dataset(tmp_path, key)
    dataset = PROTOCOLS[key].dataset(tmp_path)
    for path, end in zip(dataset.paths(names[0]), dataset.suffixes, strict=True):
        path.rename(path.with_name(path.name.removesuffix(end) + end.swapcase()))
    dataset = PROTOCOLS[key].dataset(tmp_path)
    assert dataset.names == list(names)
    assert [sample.labels.shape for sample in dataset] == [labels.shape for labels in raw]


@pytest.mark.parametrize("which", [0, 1], ids=["images", "labels"])
def test_two_files_of_one_name(tmp_path, which):
    write_dataset(tmp_path, "ade20k")
    path = files(tmp_path, "ade20k", which)[1]
    other = path.with_suffix(path.suffix.upper())
    other.write_bytes(path.read_bytes())
    if other.samefile(path):
        pytest.skip("the file system takes both names for one")
    message = error_of(tmp_path, "ade20k")
    assert str(path) in message or str(other) in message
    assert path.name in message and other.name in message
    assert "have one name; remove one of them" in message


@pytest.mark.parametrize("which", [0, 1], ids=["images", "labels"])
@pytest.mark.parametrize("key", LAYOUTS)
def test_missing_files(tmp_path, key, which):
    names, _ = write_dataset(tmp_path, key)
    path = PROTOCOLS[key].dataset(tmp_path).paths(names[1])[which]
    path.unlink()
    message = error_of(tmp_path, key, DatasetNotFoundError)
    dataset = PROTOCOLS[key].dataset
    kind, suffix = ("images", "labels")[which], dataset.suffixes[which]
    assert f"1 of 2 {kind} of {dataset.__name__} are missing ({names[1]}{suffix}); " in message
    assert str(tmp_path / dataset.home / dataset.folders[which]) in message
    assert dataset.source in message
    assert PROTOCOLS[key].dataset(tmp_path, limit=1).names == [names[0]]


def test_the_first_five_of_many_missing_files(tmp_path):
    write_dataset(tmp_path, "voc21")
    (tmp_path / LAYOUTS["voc21"][2]).write_text("".join(f"x{i}\n" for i in range(9)))
    message = error_of(tmp_path, "voc21", DatasetNotFoundError)
    assert "9 of 9 images" in message
    assert "(x0.jpg, x1.jpg, x2.jpg, x3.jpg, x4.jpg and 4 more)" in message


def test_a_folder_without_images(tmp_path):
    write_dataset(tmp_path, "ade20k")
    for path in (*files(tmp_path, "ade20k", 0), *files(tmp_path, "ade20k", 1)):
        path.unlink()
    assert "there is no *.jpg; get http" in error_of(tmp_path, "ade20k", DatasetNotFoundError)


def test_hidden_folders_do_not_count(tmp_path):
    write_dataset(tmp_path, "ade20k")
    path = files(tmp_path, "ade20k", 0)[0]
    hidden = path.parent / ".ipynb_checkpoints" / "copy.jpg"
    hidden.parent.mkdir()
    hidden.write_bytes(path.read_bytes())
    assert PROTOCOLS["ade20k"].dataset(tmp_path).names == ["000001", "000002"]


LISTS = {  # the names "000001" and "b c" in the encodings and line ends of files
    "plain": b"000001\nb c\n",
    "no end": b"000001\nb c",
    "CRLF": b"000001\r\nb c\r\n",
    "CR": b"000001\rb c\r",
    "blanks": b"\n  000001 \t\n\nb c  \n \n",
    "BOM": b"\xef\xbb\xbf000001\nb c\n",
    "UTF-16": "000001\r\nb c\r\n".encode("utf-16"),
    "UTF-16, big endian": b"\xfe\xff" + "000001\nb c\n".encode("utf-16-be"),
}


@pytest.mark.parametrize("content", LISTS.values(), ids=LISTS.keys())
@pytest.mark.parametrize("key", ["voc20", "context60"])
def test_lists(tmp_path, key, content):
    write_dataset(tmp_path, key)
    for which in (0, 1):
        path = files(tmp_path, key, which)[1]
        path.rename(path.with_stem("b c"))
    (tmp_path / LAYOUTS[key][2]).write_bytes(content)
    dataset = PROTOCOLS[key].dataset(tmp_path)
    assert [sample.name for sample in dataset] == ["000001", "b c"]


BAD_LISTS = {
    "Latin-1": ("000001\ncafé\n".encode("latin-1"), "line 2 is not UTF-8; save the file as UTF-8"),
    "UTF-16, no mark": ("000001\n".encode("utf-16-le"), "null characters are no text; save"),
    "UTF-16, cut": (b"\xff\xfe0", "is not UTF-8; save the file as UTF-8"),
    "UTF-32": ("000001\n".encode("utf-32"), "null characters are no text; save"),
    "twice": (
        b"000001\n000002\n000001\n000001 \n",
        "names on several lines (000001); leave one line",
    ),
    "empty": (b"\xef\xbb\xbf \n\n", "no names; the file must hold one a line"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_LISTS.values(), ids=BAD_LISTS.keys())
@pytest.mark.parametrize("key", ["voc20", "context60"])
def test_lists_that_are_refused(tmp_path, key, content, reason):
    write_dataset(tmp_path, key)
    path = tmp_path / LAYOUTS[key][2]
    path.write_bytes(content)
    message = error_of(tmp_path, key)
    assert message.startswith(f"{path}: ") and reason in message


def test_a_list_that_cannot_be_read(tmp_path, monkeypatch):
    write_dataset(tmp_path, "voc21")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    assert error_of(tmp_path, "voc21").endswith("val.txt: Permission denied")


@pytest.mark.parametrize("values", [(0, 255), (255,), (0,)], ids=str)
@pytest.mark.parametrize("key", LAYOUTS)
def test_masks_without_a_class(tmp_path, key, values):
    write_dataset(tmp_path, key)
    rewrite_labels(tmp_path, key, values)
    message = error_of(tmp_path, key)
    assert message.startswith(tuple(map(str, files(tmp_path, key, 1))))
    assert "the other 1 there are no labels but 0 and 255" in message
    assert PROTOCOLS[key].dataset.source in message


@pytest.mark.parametrize("key", ["voc21", "ade20k"])
def test_one_mask_with_a_class_is_enough(tmp_path, key):
    """Many images of COCO-Object have no things, so a mask without a class is no error."""
    names, _ = write_dataset(tmp_path, key)
    last = PROTOCOLS[key].dataset(tmp_path).paths(names[0])[1]
    write_labels(last, np.full(Image.open(last).size[::-1], 255, np.uint8))
    assert (PROTOCOLS[key].dataset(tmp_path)[0].labels == 255).all()


def grey_png(path, bits, labels):
    """Writes a PNG of 1, 2 or 4 bits of grey; Pillow cannot write 2 and 4."""
    height, width = labels.shape
    digits = [np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel() for row in labels]
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in digits)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


def colours(path, labels):
    Image.fromarray(labels).convert("RGB").save(path)


def grey_and_alpha(path, labels):
    Image.fromarray(labels).convert("LA").save(path)


def jpeg(path, labels):
    Image.fromarray(labels).save(path, "JPEG")


MASKS = {
    "RGB": (colours, "a mask of colours (RGB)"),
    "LA": (grey_and_alpha, "a mask of colours (LA)"),
    "JPEG": (jpeg, "a mask in the format JPEG"),
    "1 bit": (lambda path, labels: grey_png(path, 1, labels), "a mask of 1 bit of grey"),
    "2 bits": (lambda path, labels: grey_png(path, 2, labels), "a mask of 2 bits of grey"),
    "4 bits": (lambda path, labels: grey_png(path, 4, labels), "a mask of 4 bits of grey"),
}


@pytest.mark.parametrize(("write", "reason"), MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("key", ["voc21", "cityscapes"])
def test_masks_that_are_no_indices(tmp_path, key, write, reason):
    """One such mask is a failure that the evaluation reports; if all masks are such, it stops."""
    names, raw = write_dataset(tmp_path, key)
    paths = [PROTOCOLS[key].dataset(tmp_path).paths(name)[1] for name in names]
    write(paths[0], (raw[0] == raw[0].max()).astype(np.uint8))
    dataset, mend = PROTOCOLS[key].dataset(tmp_path), "; a mask is a PNG of 8 or 16 bits"
    with pytest.raises(DataError) as error:
        dataset[0]
    assert str(error.value).startswith(f"{paths[0]}: {reason}{mend}")
    assert dataset[1].labels.shape == raw[1].shape
    write(paths[1], (raw[1] == raw[1].max()).astype(np.uint8))
    assert error_of(tmp_path, key).startswith(f"{paths[0]}: {reason}{mend}")


def test_values_of_any_depth_that_keeps_them(tmp_path):
    """Palettes of 2, 4 and 8 bits and 16 bits of grey keep the indices."""
    names, _ = write_dataset(tmp_path, "voc21")
    path = PROTOCOLS["voc21"].dataset(tmp_path).paths(names[0])[1]
    labels = np.resize(np.array([0, 1, 2, 3], np.uint8), SIZES[1][::-1])
    for bits in (2, 4, 8):
        image = Image.fromarray(labels).convert("P")
        image.putdata(labels.ravel().tolist())
        image.save(path, bits=bits)
        assert np.array_equal(PROTOCOLS["voc21"].dataset(tmp_path)[0].labels, labels)
    Image.fromarray(labels.astype(np.uint16)).save(path)
    assert np.array_equal(PROTOCOLS["voc21"].dataset(tmp_path)[0].labels, labels)
    Image.fromarray(labels.astype(np.uint16) + 256).save(path)
    with pytest.raises(DataError, match="label 259, where VOC21 has 0 to 20"):
        PROTOCOLS["voc21"].dataset(tmp_path)[0]


@pytest.mark.parametrize(("key", "last"), [("voc20", 20), ("ade20k", 150), ("cityscapes", 18)])
def test_labels_beyond_the_classes_are_named_as_in_the_file(tmp_path, key, last):
    write_dataset(tmp_path, key)
    rewrite_labels(tmp_path, key, (last, last + 1))
    assert f": label {last + 1}, where " in (message := error_of(tmp_path, key))
    assert f" has 0 to {last}, and 255 for pixels that do not count; " in message


@pytest.mark.parametrize("key", ["voc21", "scenes"])
@pytest.mark.parametrize("limit", [0, -1])
def test_limits_that_are_refused(tmp_path, key, limit):
    with pytest.raises(ValueError, match=f"limit must be at least 1, got {limit}"):
        PROTOCOLS[key].dataset(tmp_path, limit)
