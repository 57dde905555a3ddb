"""The pictures of segmentations, their legends and their colours."""

import numpy as np
import pytest
from PIL import Image

from scclip_fast.plots import fonts, segmentation
from scclip_fast.plots.palette import colors, palette
from scclip_fast.scenes.draw import CLASSES, scene


def _oklab(rgb):
    """OKLab (Ottosson, 2020) of sRGB (N, 3) up to 255; its distances are about perceived ones."""
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def test_palette():
    colors = palette()
    assert (colors.shape, colors.dtype) == ((256, 3), np.uint8)
    assert colors[0].tolist() == [0, 114, 178]  # blue of Okabe and Ito
    assert len(np.unique(colors, axis=0)) == 256
    lab = _oklab(colors[:42])
    distance = np.linalg.norm(lab[:, None] - lab, axis=2) + np.eye(42)
    assert distance.min() > 0.08  # random colours: about 0.02


def test_colors_repeat():
    classes = np.array([[0, 255], [256, 513]], np.uint16)
    np.testing.assert_array_equal(colors(classes), palette()[[[0, 255], [0, 1]]])


def test_oklab():
    lab = _oklab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]))
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
    pixels = np.asarray(segmentation.draw(photo, labels, list(CLASSES)))
    em = 13  # of small photos
    blended = np.asarray(segmentation.blend(photo, labels))
    np.testing.assert_array_equal(pixels[em : em + height, em : em + width], blended)
    half = em // 2
    rest = pixels.copy()
    rest[em : em + height, em : em + width] = 255
    assert white(rest[: em + height + half, : em + width + half])  # a gap around the photo
    for border in (pixels[:half], pixels[-half:], pixels[:, :half], pixels[:, -half:]):
        assert white(border)  # nothing is cut off
    colors = {tuple(color) for color in rest.reshape(-1, 3).tolist()}
    assert {tuple(color) for color in palette()[:count].tolist()} <= colors


def test_classes_are_told_apart():
    photo = Image.new("RGB", (90, 60), (120, 120, 120))
    labels = np.zeros((60, 90), np.uint8)
    labels[:, 50:] = 1
    blended = np.asarray(segmentation.blend(photo, labels)).astype(int)
    assert (blended[:, 20:40] == blended[0, 20]).all() and (blended[:, 60:] == blended[0, 60]).all()
    assert abs(blended[0, 20] - blended[0, 60]).max() > 50
    line = blended.min(axis=2)
    assert line[30, 48:52].max() > 180 > line[30, :46].max()  # white, on the border


def test_large_photos_are_drawn_smaller():
    photo = Image.new("RGB", (3000, 30))
    picture = segmentation.draw(photo, np.zeros((30, 3000), np.uint8), ["sky"])
    assert 2048 < picture.width < 2048 + 100


def test_legend_begins_with_the_largest():
    labels = np.full((100, 200), 3, np.uint8)
    labels[:10] = 1
    pixels = np.asarray(
        segmentation.draw(Image.new("RGB", (200, 100)), labels, ["a", "b", "c", "d"])
    )
    legend = pixels[13 + 100 :].swapaxes(0, 1).reshape(-1, 3)  # column by column
    order = [i for color in legend for i in range(4) if (color == palette()[i]).all()]
    assert list(dict.fromkeys(order)) == [3, 1]


def test_texts():
    assert [segmentation.percent(x) for x in (1, 0.12345, 0.0001)] == [
        "100.0 %",
        "12.3 %",
        "< 0.1 %",
    ]
    font = fonts.DEFAULT.sized(13)
    assert segmentation._shortened("sky", font, 100) == "sky"
    short = segmentation._shortened("a very long name of a class", font, 100)
    assert short.startswith("a very") and short.endswith("…") and font.getlength(short) <= 100


@pytest.mark.parametrize("sought", [True, False])
def test_compare(sought):
    """The picture has the outliers over the photo, the labels of both models, and a legend."""
    photo = Image.fromarray(scene("train", 0, (60, 90)).image)
    before, after = np.zeros((2, 60, 90), np.uint8)
    before[:, 45:], after[:, 60:] = 1, 2
    outliers = np.zeros((3, 3), bool)
    outliers[1, 2] = True  # rows 20 to 39, columns 60 to 89
    names = ["sky", "tree", "sea"]
    pixels = np.asarray(
        segmentation.compare(photo, outliers if sought else None, before, after, names)
    )
    em = 13
    panels = [
        pixels[3 * em : 3 * em + 60, left : left + 90] for left in range(em, 4 * (90 + em), 90 + em)
    ]
    for panel, labels in zip(panels[sought:], (before, after), strict=False):
        np.testing.assert_array_equal(panel, np.asarray(segmentation.blend(photo, labels)))
    if sought:
        marked = (panels[0] == np.asarray(segmentation._muted(photo))).all(axis=2)
        assert marked.sum() == 60 * 90 - 20 * 30 and not marked[20:40, 60:].any()
    legend = pixels[3 * em + 60 :]
    for color in palette()[:3]:
        assert (legend == color).all(axis=2).any()


def test_shares_of_a_comparison(monkeypatch):
    shares = []
    monkeypatch.setattr(
        segmentation._Legend, "draw", lambda legend, *_: shares.extend(legend.shares)
    )
    before, after = np.array([[0, 0, 1, 1]], np.uint8), np.array([[0, 2, 2, 2]], np.uint8)
    segmentation.compare(Image.new("RGB", (4, 1)), None, before, after, ["a", "b", "c", "d"])
    assert shares == ["50.0 % → 25.0 %", "0.0 % → 75.0 %", "50.0 % → 0.0 %"]


@pytest.mark.parametrize("count", [48, 49, 300])
def test_legends_of_many_classes(count, monkeypatch):
    """Class c has c + 1 pixels. Those beyond 48 entries are counted, the smallest first."""
    drawn = []
    monkeypatch.setattr(segmentation._Legend, "draw", lambda *args: drawn.append(args))
    labels = np.repeat(np.arange(count), np.arange(count) + 1).astype(np.uint16)[None]
    names = [f"name {index}" for index in range(count)]
    segmentation.draw(Image.new("RGB", (labels.size, 1)), labels, names)
    ((legend, _, _, fills),) = drawn
    texts = [text for text, _ in legend.names]
    largest = [count - 1 - index for index in range(48 if count == 48 else 47)]
    others = count - len(largest)
    assert texts == [names[index] for index in largest] + [f"{others} other classes"][: others > 0]
    assert [fill for fill in fills if fill] == [tuple(colors(c).tolist()) for c in largest]
    assert len(fills) == len(legend.shares) == len(texts) == 48
    if others:
        pixels = sum(range(others + 1))
        assert fills[-1] is None
        assert legend.shares[-1] == segmentation.percent(pixels / labels.size)


def test_large_photos_are_compared_smaller():
    labels = np.zeros((30, 3000), np.uint8)
    picture = segmentation.compare(Image.new("RGB", (3000, 30)), None, labels, labels, ["sky"])
    assert 2048 < picture.width < 2048 + 100
