"""Images of every mode, turned, deep or transparent, become upright 8-bit RGB."""

import sys
from types import ModuleType
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from tiny_clip import photo, tiny_clip, tokenizer

from scclip_fast.clip import SCCLIP
from scclip_fast.segment import Segmenter
from scclip_fast.segment import image as images

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def pixels(image):
    return np.asarray(images.to_rgb(image)).reshape(-1, 3).tolist()


def palette(mode, colors):
    """Returns an image of mode P or PA with one pixel for each colour."""
    image = Image.new("P", (len(colors), 1))
    image.putpalette([value for color in colors for value in color])
    image.putdata(range(len(colors)))
    return image if mode == "P" else image.convert("PA")


def with_pixels(mode, values):
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def transparent_palette():
    image = palette("P", [RED, BLUE, GREEN])
    image.info["transparency"] = bytes([255, 0, 255])
    return image


def palette_with_alpha():
    image = palette("PA", [RED, BLUE])
    image.putalpha(with_pixels("L", [255, 0]))
    return image


def key_color():
    """Returns an image without alpha in which one colour is transparent, as PNG allows."""
    image = with_pixels("RGB", [RED, BLUE])
    image.info["transparency"] = BLUE
    return image


MODES = {
    "1": (with_pixels("1", [0, 255]), [(0, 0, 0), WHITE]),
    "L": (with_pixels("L", [0, 7, 255]), [(0, 0, 0), (7, 7, 7), WHITE]),
    # grey 100 with an alpha of 51 / 255 = 1 / 5 over white: 255 - 155 / 5
    "LA": (with_pixels("LA", [(100, 255), (100, 0), (100, 51)]), [[100] * 3, WHITE, [224] * 3]),
    "P": (palette("P", [RED, BLUE]), [RED, BLUE]),
    "P with transparency": (transparent_palette(), [RED, WHITE, GREEN]),
    "PA": (palette_with_alpha(), [RED, WHITE]),
    "RGB with a key": (key_color(), [RED, WHITE]),
    "RGBA": (
        with_pixels("RGBA", [(*RED, 255), (*RED, 0), (0, 0, 0, 102)]),
        [RED, WHITE, [153] * 3],
    ),
    "CMYK": (with_pixels("CMYK", [(0, 255, 255, 0), (0, 0, 0, 255)]), [RED, (0, 0, 0)]),
    "I;16": (with_pixels("I;16", [0, 256, 65535]), [(0, 0, 0), (1, 1, 1), WHITE]),
    "I;16 of 12 bits": (with_pixels("I;16", [0, 2048, 4095]), [(0, 0, 0), [128] * 3, WHITE]),
    "I;16 of 8 bits": (with_pixels("I;16", [0, 7, 255]), [(0, 0, 0), (7, 7, 7), WHITE]),
    "I;16 dim": (
        with_pixels("I;16", [0, 32000]),
        [(0, 0, 0), [125] * 3],
    ),  # of 16 bits, not 15
    "I": (with_pixels("I", [0, 256, 65535]), [(0, 0, 0), (1, 1, 1), WHITE]),
    "I of 24 bits": (with_pixels("I", [1 << 23, (1 << 24) - 1]), [[128] * 3, WHITE]),
    "F to 1": (with_pixels("F", [0.0, 0.2, 1.0]), [(0, 0, 0), (51, 51, 51), WHITE]),
    "F to 255": (with_pixels("F", [0.0, 7.5, 255.0]), [(0, 0, 0), (7, 7, 7), WHITE]),
    "F to 65535": (with_pixels("F", [256.0, 65535.0]), [(1, 1, 1), WHITE]),
    "black": (with_pixels("I;16", [0, 0]), [(0, 0, 0), (0, 0, 0)]),
}


@pytest.mark.parametrize(("image", "expected"), MODES.values(), ids=MODES.keys())
def test_modes(image, expected):
    assert pixels(image) == [list(color) for color in expected]
    assert images.to_rgb(images.to_rgb(image)) == images.to_rgb(image)


@pytest.mark.parametrize("name", ["I;16", "I;16 of 12 bits"])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_deep_files(name, suffix, tmp_path):
    image, expected = MODES[name]
    image.save(tmp_path / f"deep.{suffix}")
    assert pixels(images.read(tmp_path / f"deep.{suffix}")) == [list(c) for c in expected]


@pytest.mark.parametrize("name", ["1", "LA", "P with transparency", "RGB with a key", "RGBA"])
def test_files_with_transparency(name, tmp_path):
    image, expected = MODES[name]
    image.save(tmp_path / "picture.png", transparency=image.info.get("transparency"))
    assert pixels(images.read(tmp_path / "picture.png")) == [list(color) for color in expected]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_values_that_are_no_grey(value):
    with pytest.raises(ValueError, match="grey values must be finite and not below 0"):
        images.to_rgb(with_pixels("F", [0.0, value]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, tmp_path):
    stored = Image.fromarray(photo(20, 30).numpy())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    upright = stored.transpose(method[orientation]) if orientation > 1 else stored
    found = images.read(tmp_path / "turned.png")
    assert found.size == upright.size and found.tobytes() == upright.tobytes()


@pytest.fixture(scope="module")
def segmenter():
    encoder = SCCLIP(tiny_clip(layers=3).double())
    settings = dict(templates=["a {}."], short_side=48, slide_crop=32, slide_stride=16)
    return Segmenter(encoder, tokenizer(), ["sky", "person", "tree"], **settings)


def test_a_turned_image_is_segmented_upright(segmenter, tmp_path):
    upright = Image.fromarray(photo(60, 80).numpy())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stored a quarter turn to the left
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert turned.size == (60, 80)
        labels = segmenter(turned)
    assert labels.shape == (60, 80) and len(labels.unique()) > 1
    assert torch.equal(labels, segmenter(upright))


def test_a_deep_image_is_segmented_as_its_eight_bits(segmenter):
    grey = photo(60, 80)[..., 0].numpy()
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert torch.equal(segmenter(deep), segmenter(Image.fromarray(grey)))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_an_animation(suffix, tmp_path):
    first, second = (Image.new("RGB", (8, 8), color) for color in (WHITE, (0, 0, 0)))
    first.save(tmp_path / f"two.{suffix}", save_all=True, append_images=[second])
    assert pixels(images.read(tmp_path / f"two.{suffix}")) == 64 * [list(WHITE)]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "gif"])
def test_truncated_files(suffix, tmp_path):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(photo(60, 80).numpy()).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(images.ImageError, match=rf"{path}: [^\n]+$"):
        images.read(path)


@pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="this Pillow has no AVIF")
def test_avif(tmp_path):
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "red.avif", quality=100)
    found = np.asarray(images.read(tmp_path / "red.avif")).astype(int)
    assert abs(found - [200, 100, 50]).max() <= 3


def test_heic_by_pillow_heif(tmp_path, monkeypatch):
    """pillow-heif registers its decoder only on request, and once is enough."""
    plugin = ModuleType("pillow_heif")
    plugin.register_heif_opener = Mock()
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    images._register_heif.cache_clear()
    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    images.read(tmp_path / "black.png")
    images.read(tmp_path / "black.png")
    images._register_heif.cache_clear()
    plugin.register_heif_opener.assert_called_once_with()


def test_files_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.new("RGB", (40, 50)).save(tmp_path / "large.png")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (tmp_path / "text.png").write_text("no picture")
    reasons = {
        "absent.png": "No such file",
        "large.png": "40 × 50 pixels; at most 0 million",
        "phone.HEIC": "pip install pillow-heif",
        "text.png": "not an image, or a damaged one$",
    }
    for name, reason in reasons.items():
        with pytest.raises(images.ImageError, match=f"{name}: .*{reason}"):
            images.read(tmp_path / name, max_pixels=1999)
