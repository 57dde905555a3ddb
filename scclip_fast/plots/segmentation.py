"""Photos in the colours of their classes, with a legend of names and shares."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from . import fonts
from .palette import colors

LONG_SIDE = 2048  # pixels; larger photos are drawn smaller
LEGEND = 48  # entries; a longer legend is larger than most photos
_OPACITY = 0.6  # of the class colours
_SATURATION = 0.2  # of the photo, whose own colours would mix with those of the classes
_LINE = 0.8  # opacity of the outlines
_OUTLIER = (213, 94, 0)
_INK, _GREY = (34, 34, 34), (110, 110, 110)


def draw(
    photo: Image.Image, labels: np.ndarray, names: list[str], font: Path | None = None
) -> Image.Image:
    """Draws the photo in the colours of its classes, and a legend beside or below the photo.

    The legend has the name of each class and its share of the pixels. A name that no font can draw
    is replaced by the number of its class. Of more than 48 classes, the legend has the largest 47,
    and the number and the share of the others.

    Args:
        photo: RGB, (W, H).
        labels: (H, W), uint8 or uint16, indices into names.
        names: one name a class.
        font: a font file for the names whose characters it has, see `fonts.faces`.
    """
    small = _fitted(photo, LONG_SIDE)
    blended = blend(small, _resized(labels, small.size))
    return _with_legend(blended, _em(small), names, font, labels)


def compare(
    photo: Image.Image,
    outliers: np.ndarray | None,
    before: np.ndarray,
    after: np.ndarray,
    names: list[str],
    font: Path | None = None,
) -> Image.Image:
    """Draws three panels: the outlier tokens, then the labels of the frozen and calibrated model.

    Args:
        photo: RGB, (W, H).
        outliers: (h, w), bool, over a grid of tokens; None leaves the first panel out.
        before: (H, W), uint8 or uint16, the labels of the frozen model.
        after: (H, W), uint8 or uint16, the labels of the calibrated model.
        names: see `draw`.
        font: see `draw`.
    """
    small = _fitted(photo, LONG_SIDE // 2)
    masks = {"frozen": before, "calibrated": after}
    panels = {name: blend(small, _resized(mask, small.size)) for name, mask in masks.items()}
    if outliers is not None:
        title = f"outliers: {outliers.sum()} of {outliers.size} tokens"
        panels = {title: _marked(small, _resized(outliers, small.size))} | panels
    em = _em(small)
    return _with_legend(_row(panels, fonts.DEFAULT.sized(em)), em, names, font, before, after)


def _fitted(photo: Image.Image, long_side: int) -> Image.Image:
    scale = min(1, long_side / max(photo.size))
    size = tuple(max(round(side * scale), 1) for side in photo.size)
    return photo.resize(size, Image.Resampling.LANCZOS)


def _resized(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # Pillow rounds the places of an image of 16 bits in another way than those of 8 and 32 bits.
    wide = Image.fromarray(labels.astype(np.int32))
    return np.asarray(wide.resize(size, Image.Resampling.NEAREST))


def _em(photo: Image.Image) -> int:
    """Returns the size of the letters in pixels."""
    return min(max(round(0.026 * math.sqrt(photo.width * photo.height)), 13), 40)


def _with_legend(
    picture: Image.Image, em: int, names: list[str], font: Path | None, *labels: np.ndarray
) -> Image.Image:
    """Adds a legend with the share of each class in each of the label maps."""
    classes = ranked(*labels)
    shown = [*classes] if len(classes) <= LEGEND else [*classes][: LEGEND - 1]
    entries = _entries(shown, names, font, em)
    shares = [classes[index] for index in shown]
    fills = [tuple(color) for color in colors(np.array(shown)).tolist()]
    if others := [*classes.values()][len(shown) :]:
        entries.append((f"{len(others)} other classes", fonts.DEFAULT.sized(em)))
        shares.append([sum(share) for share in zip(*others, strict=True)])
        fills.append(None)
    legend = _Legend(em, entries, [" → ".join(map(percent, each)) for each in shares])
    place = legend.place(picture.size)
    canvas = Image.new("RGB", place.canvas, "white")
    canvas.paste(picture, (em, em))
    legend.draw(canvas, place, fills)
    return canvas


def _entries(
    classes: list[int], names: list[str], file: Path | None, em: int
) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """Returns the text of each class in the legend, and the font of that text."""
    entries = []
    for index, face in zip(
        classes, fonts.faces([names[index] for index in classes], file), strict=True
    ):
        text = f"class {index} (no font has its name)" if face is None else names[index]
        entries.append((text, (face or fonts.DEFAULT).sized(em)))
    return entries


def ranked(*labels: np.ndarray) -> dict[int, list[float]]:
    """Returns the classes by size, the largest first, and their shares of each label map.

    The label maps are unsigned integers of shape (H, W); classes without a pixel are left out.
    """
    count = max(map(np.max, labels)) + 1
    counts = np.array([np.bincount(mask.ravel(), minlength=count) for mask in labels])
    total = counts.sum(axis=0)
    order = (int(index) for index in np.argsort(-total, kind="stable") if total[index])
    return {index: (counts[:, index] / labels[0].size).tolist() for index in order}


def _row(panels: dict[str, Image.Image], font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draws panels of one size beside each other, each under its title."""
    (width, height), em = next(iter(panels.values())).size, font.size
    row = Image.new("RGB", (len(panels) * (width + em) - em, height + 2 * em), "white")
    pen = ImageDraw.Draw(row)
    for index, (title, panel) in enumerate(panels.items()):
        left = index * (width + em)
        pen.text((left, em), _shortened(title, font, width), _INK, font, anchor="lm")
        row.paste(panel, (left, 2 * em))
    return row


def _marked(photo: Image.Image, outliers: np.ndarray) -> Image.Image:
    """Paints the outlier tokens (H, W) over the photo."""
    marked = _muted(photo)
    marked.paste(_OUTLIER, mask=Image.fromarray((255 * _LINE * outliers).astype(np.uint8)))
    return marked


def _muted(photo: Image.Image) -> Image.Image:
    return Image.blend(photo.convert("L").convert("RGB"), photo, _SATURATION)


def blend(photo: Image.Image, labels: np.ndarray) -> Image.Image:
    """Blends an RGB photo with the colours of its labels, and draws white lines between classes.

    The labels are integers of shape (H, W).
    """
    colored = Image.blend(_muted(photo), Image.fromarray(colors(labels)), _OPACITY)
    width = max(1, round(math.sqrt(labels.size) / 450))
    colored.paste((255, 255, 255), mask=_outlines(labels, width))
    return colored


def _outlines(labels: np.ndarray, width: int) -> Image.Image:
    """Returns the opacity of lines between classes, `width` pixels wide with blurred sides."""
    lines = np.zeros(labels.shape, bool)
    lines[1:] |= labels[1:] != labels[:-1]
    lines[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    for step in range(width - 1):  # alternately to the upper left and the lower right
        here, there = (slice(None, -1), slice(1, None))[:: 1 if step % 2 == 0 else -1]
        before = lines.copy()
        lines[here] |= before[there]
        lines[:, here] |= before[:, there]
    mask = Image.fromarray((255 * _LINE * lines).astype(np.uint8))
    return mask.filter(ImageFilter.GaussianBlur(0.3 * width))


class _Place(NamedTuple):
    """The layout of photo and legend; sizes and corners are (x, y) in pixels."""

    canvas: tuple[int, int]
    corner: tuple[int, int]  # of the legend
    rows: int  # entries in a column of the legend


class _Legend:
    """Columns of entries: a colour, a name in its font, and a share."""

    def __init__(
        self, em: int, names: list[tuple[str, ImageFont.FreeTypeFont]], shares: list[str]
    ) -> None:
        self.font, self.em = fonts.DEFAULT.sized(em), em
        self.names = [(_shortened(name, font, 20 * em), font) for name, font in names]
        self.shares = shares
        self.row = round(1.75 * self.em)
        self.gap = 2 * self.em  # between columns
        self.name_width = math.ceil(max(font.getlength(name) for name, font in self.names))
        self.share_width = math.ceil(max(map(self.font.getlength, ["100.0 %", *shares])))
        self.column = round(1.6 * self.em) + self.name_width + self.em + self.share_width

    def place(self, photo: tuple[int, int]) -> _Place:
        """Chooses the number of columns, and beside or below the photo, by the lowest `_cost`."""
        width, height = photo
        em, places = self.em, []
        for columns in range(1, len(self.names) + 1):
            rows = math.ceil(len(self.names) / columns)
            legend = columns * (self.column + self.gap) - self.gap, rows * self.row
            beside = width + legend[0] + 3 * em + em // 2, max(height, legend[1]) + 2 * em
            below = max(width, legend[0]) + 2 * em, height + legend[1] + 2 * em + em // 2
            places.append(_Place(beside, (width + 2 * em + em // 2, em), rows))
            places.append(_Place(below, (em, height + em + em // 2), rows))
        return min(places, key=lambda place: _cost(*place.canvas))

    def draw(self, canvas: Image.Image, place: _Place, fills: list[tuple[int, ...] | None]) -> None:
        """Draws the entries; one without a fill has no square of colour."""
        pen, em = ImageDraw.Draw(canvas), self.em
        for index, fill in enumerate(fills):
            column, row = divmod(index, place.rows)
            x = place.corner[0] + column * (self.column + self.gap)
            middle = place.corner[1] + row * self.row + self.row // 2
            top = middle - em // 2
            pen.rounded_rectangle((x, top, x + em, top + em), radius=em // 4, fill=fill)
            text = x + round(1.6 * em)
            name, font = self.names[index]
            pen.text((text, middle), name, _INK, font, anchor="lm")
            pen.text((x + self.column, middle), self.shares[index], _GREY, self.font, anchor="rm")


def _cost(width: int, height: int) -> float:
    """Returns the area of a canvas, raised for those longer than 1.6 times their shorter side."""
    return width * height * max(max(width, height) / min(width, height), 1.6)


def _shortened(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(f"{name}…") > width:
        name = name[:-1].rstrip()
    return f"{name}…"


def percent(share: float) -> str:
    """Formats a share in [0, 1], such as 12.3 %."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
