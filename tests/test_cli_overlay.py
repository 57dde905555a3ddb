"""The picture of `scclip-fast segment`."""

import numpy as np
import pytest
from PIL import Image

from scclip_fast.cli import overlay
from scclip_fast.scenes.draw import CLASSES, scene


def test_palette():
    colors = overlay.palette()
    assert (colors.shape, colors.dtype) == ((256, 3), np.uint8)
    assert colors[0].tolist() == [0, 114, 178]  # blue of Okabe and Ito
    assert len(np.unique(colors, axis=0)) == 256
    lab = overlay._oklab(colors[:42])
    distance = np.linalg.norm(lab[:, None] - lab, axis=2) + np.eye(42)
    assert distance.min() > 0.08  # random colours: about 0.02


def test_oklab():
    lab = overlay._oklab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]))
    expected = [[1, 0, 0], [0, 0, 0], [0.628, 0.225, 0.126]]
    np.testing.assert_allclose(lab, expected, atol=1e-3)


def white(pixels):
    return (pixels == 255).all()


SIZES = {"landscape": (120, 200), "portrait": (200, 120), "tiny": (8, 12), "strip": (20, 600)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("count", [1, 5, 42])
def test_legend_and_photo_stand_apart(size, count):
    height, width = size
    labels = (np.arange(height * width).reshape(size) % count).astype(np.uint8)
    photo = Image.fromarray(scene("train", 0, (200, 600)).image[:height, :width])
    pixels = np.asarray(overlay.draw(photo, labels, list(CLASSES)))
    em = 13  # of small photos
    blended = np.asarray(overlay.blend(photo, labels))
    np.testing.assert_array_equal(pixels[em : em + height, em : em + width], blended)
    half = em // 2
    rest = pixels.copy()
    rest[em : em + height, em : em + width] = 255
    assert white(rest[: em + height + half, : em + width + half])  # a gap around the photo
    for border in (pixels[:half], pixels[-half:], pixels[:, :half], pixels[:, -half:]):
        assert white(border)  # nothing is cut off
    colors = {tuple(color) for color in rest.reshape(-1, 3).tolist()}
    assert {tuple(color) for color in overlay.palette()[:count].tolist()} <= colors


def test_classes_are_told_apart():
    photo = Image.new("RGB", (90, 60), (120, 120, 120))
    labels = np.zeros((60, 90), np.uint8)
    labels[:, 50:] = 1
    blended = np.asarray(overlay.blend(photo, labels)).astype(int)
    assert (blended[:, 20:40] == blended[0, 20]).all() and (blended[:, 60:] == blended[0, 60]).all()
    assert abs(blended[0, 20] - blended[0, 60]).max() > 50
    line = blended.min(axis=2)
    assert line[30, 48:52].max() > 180 > line[30, :46].max()  # white, on the border


def test_large_photos_are_drawn_smaller():
    photo = Image.new("RGB", (3000, 30))
    picture = overlay.draw(photo, np.zeros((30, 3000), np.uint8), ["sky"])
    assert 2048 < picture.width < 2048 + 100


def test_legend_begins_with_the_largest():
    labels = np.full((100, 200), 3, np.uint8)
    labels[:10] = 1
    pixels = np.asarray(overlay.draw(Image.new("RGB", (200, 100)), labels, ["a", "b", "c", "d"]))
    legend = pixels[13 + 100 :].swapaxes(0, 1).reshape(-1, 3)  # column by column
    order = [i for color in legend for i in range(4) if (color == overlay.palette()[i]).all()]
    assert list(dict.fromkeys(order)) == [3, 1]


def test_texts():
    assert [overlay.percent(x) for x in (1, 0.12345, 0.0001)] == ["100.0 %", "12.3 %", "< 0.1 %"]
    font = overlay.ImageFont.truetype(overlay._FONT, 13)
    assert overlay._shortened("sky", font, 100) == "sky"
    short = overlay._shortened("a very long name of a class", font, 100)
    assert short.startswith("a very") and short.endswith("…") and font.getlength(short) <= 100
