"""Legends in any script: with a given font, with a font of the system, or with numbers."""

import shutil

import numpy as np
import pytest
from cli_runs import save_tiny, segment
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from scclip_fast.plots import fonts, segmentation

NAMES = ["字", "典"]
NUMBERS = ["class 0 (no font has its name)", "class 1 (no font has its name)"]
LABELS = np.repeat(np.array([[0, 1]], np.uint8), 40, axis=1).repeat(40, axis=0)


def box(width):
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (width, 700), (width, 0)):
        pen.lineTo(corner)
    pen.closePath()
    return pen.glyph()


def save_font(path, characters):
    """Saves a font in which the i-th character is a box, 100 (i + 2) wide."""
    order = [".notdef", *(f"glyph{i}" for i in range(len(characters)))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(dict(zip(map(ord, characters), order[1:], strict=True)))
    builder.setupGlyf({name: box(100 * i + 100) for i, name in enumerate(order)})
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture(autouse=True)
def no_fonts_of_the_system(tmp_path, monkeypatch):
    """fontconfig finds the fonts of tmp_path/fonts alone."""
    (tmp_path / "fonts").mkdir()
    config = f"<fontconfig><dir>{tmp_path}/fonts</dir><cachedir>{tmp_path}/cache</cachedir>"
    (tmp_path / "fonts.conf").write_text(f"{config}</fontconfig>")
    monkeypatch.setenv("FONTCONFIG_FILE", str(tmp_path / "fonts.conf"))
    fonts._system_face.cache_clear()
    yield
    fonts._system_face.cache_clear()


def draw(names, font=None):
    return np.asarray(segmentation.draw(Image.new("RGB", (80, 40)), LABELS, names, font))


def test_letters_and_spaces_are_matplotlibs():
    names = ["sky", "Gemüse im Topf", "вода", "θάλασσα", "a\u00a0b", "zero\u200dwidth"]
    assert fonts.faces(names) == [fonts.DEFAULT] * len(names)


@pytest.mark.skipif(shutil.which("fc-match") is None, reason="fontconfig is not installed")
def test_a_font_of_the_system(tmp_path):
    path = save_font(tmp_path / "fonts" / "boxes.ttf", NAMES[0])
    assert fonts.faces(["sky", *NAMES]) == [fonts.DEFAULT, fonts.Face(str(path)), None]
    np.testing.assert_array_equal(draw(["sky", NAMES[0]]), draw(["sky", NAMES[0]], path))


def test_a_font_that_is_given(tmp_path):
    path = save_font(tmp_path / "boxes.ttf", "".join(NAMES))
    assert fonts.faces([*NAMES, "sky"], path) == 2 * [fonts.Face(str(path))] + [fonts.DEFAULT]
    # The first class's box is half as wide as the second's.
    legend = draw(NAMES, path)[:, : 13 + 30 + 80]
    assert (legend != draw(NUMBERS)[:, : legend.shape[1]]).any()
    swapped = draw(NAMES[::-1], path)
    assert (draw(NAMES, path) != swapped).any()


def test_numbers_where_no_font_has_the_name(monkeypatch):
    np.testing.assert_array_equal(draw(NAMES), draw(NUMBERS))
    fonts._system_face.cache_clear()
    monkeypatch.setenv("PATH", "")  # without fontconfig
    np.testing.assert_array_equal(draw(NAMES), draw(NUMBERS))


def test_what_is_no_font(tmp_path):
    (tmp_path / "text.ttf").write_text("no font")
    for name in ("text.ttf", "absent.ttf"):
        with pytest.raises(ValueError, match=f"{name} is not a font"):
            fonts.check(tmp_path / name)


def test_the_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = save_tiny(tmp_path)
    Image.effect_noise((60, 40), 50).save("photo.png")
    path = save_font(tmp_path / "boxes.ttf", "".join(NAMES))
    run = dict(model=tiny, classes=",".join(NAMES))
    code, _, stderr = segment("photo.png", **run)
    assert code == 0 and "no font has the characters of 2 class names" in stderr
    numbers = np.asarray(Image.open("segments/photo_overlay.png"))
    code, _, stderr = segment("photo.png", "--font", path, "--out", "drawn", **run)
    assert (code, stderr) == (0, "")
    drawn = np.asarray(Image.open("drawn/photo_overlay.png"))
    assert numbers.shape != drawn.shape or (numbers != drawn).any()
    code, _, stderr = segment("photo.png", "--font", "photo.png", **run)
    assert code == 2 and "--font photo.png is not a font" in stderr and stderr.count("\n") == 1
